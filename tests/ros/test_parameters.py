"""The parameter table: the YAML and the documentation equal it, and nothing that it forbids gets into the node."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flashdrive_node.engine.fake import FAULTS
from flashdrive_node.model.precision import FORMATS, PRESETS, StagePrecision
from flashdrive_node.ros.declare import descriptor
from flashdrive_node.ros.engines import choose_engine
from flashdrive_node.ros.parameters import (
    AT_START,
    FAKE_FAULTS,
    SPECS,
    ParameterError,
    Parameters,
    parameters_from,
    parameters_markdown,
    parameters_yaml,
)
from flashdrive_node.runtime.rig import load_rig, share_directory

YAML = share_directory() / "params" / "flashdrive.yaml"
NUMBERS = [spec for spec in SPECS.values() if spec.minimum is not None]


def test_the_yaml_is_the_table():
    assert YAML.read_text() == parameters_yaml(), "write the file anew with parameters_yaml()"
    loaded = yaml.safe_load(YAML.read_text())["/**"]["ros__parameters"]
    assert loaded == {name: spec.default for name, spec in SPECS.items()}
    assert parameters_from(loaded) == Parameters()


def test_the_markdown_has_a_row_for_every_parameter():
    rows = parameters_markdown().splitlines()[2:]
    assert [re.match(r"\| `([^`]+)`", row)[1] for row in rows] == list(SPECS)
    assert all(row.count("|") == 6 for row in rows)


def test_every_parameter_has_a_description_and_every_number_a_range():
    for spec in SPECS.values():
        assert spec.description
        assert (type(spec.default) in (int, float)) == (spec.minimum is not None), spec.name
        assert spec.accept(spec.default) == spec.default
        if spec.name.endswith("_s"):
            assert spec.unit == "s"


def test_the_faults_are_those_of_the_fake_engine():
    assert FAKE_FAULTS == FAULTS


def test_the_formats_are_those_of_the_stages():
    stages = {name.removeprefix("stages."): spec for name, spec in SPECS.items() if name.startswith("stages.")}
    assert {name: spec.choices[1:] for name, spec in stages.items()} == FORMATS


def test_stages_are_set_over_a_preset():
    rig = load_rig("sample")

    def precision(**values: str) -> StagePrecision:
        names = {name.replace("__", "."): value for name, value in values.items()}
        parameters = parameters_from({"checkpoint": "x", "device": "cpu"} | names)
        return choose_engine(parameters, rig).make().settings.stages

    assert precision(precision="w4a8") == PRESETS["w4a8"]
    assert precision(precision="w4a8", stages__lm_head="int4") == replace(PRESETS["w4a8"], lm_head="int4")
    assert precision(precision="bfloat16", stages__drafter="fp8") == StagePrecision(drafter="fp8")
    with pytest.raises(ParameterError, match=r"'precision' must be .* where 'stages.expert' is set, found 'auto'"):
        precision(stages__expert="fp8")
    with pytest.raises(ParameterError, match=r"'stages.lm_head' must be preset, bf16, int8 or int4"):
        precision(precision="fp8", stages__lm_head="fp8")


@given(st.sampled_from(NUMBERS), st.one_of(st.integers(-(2**40), 2**40), st.floats()))
def test_numbers_are_taken_within_their_range_and_refused_outside(spec, value):
    fits = type(value) is type(spec.default) or (type(spec.default) is float and type(value) is int)
    if fits and spec.minimum <= value <= spec.maximum:
        accepted = spec.accept(value)
        assert accepted == value
        assert type(accepted) is type(spec.default)
    else:
        with pytest.raises(ValueError, match=f"'{spec.name}' must be") as caught:
            spec.accept(value)
        assert spec.range_text in str(caught.value)
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [None, "1", True, [1.0], "yes"])
def test_wrong_types_are_refused(value):
    with pytest.raises(ValueError, match=r"must be 0\.05 to 60 s"):
        SPECS["max_result_age_s"].accept(value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ParameterError) as caught:
        parameters_from({"engine": "quick", "top_p": 1.5, "num_samples": 0, "checkpiont": "x", "seed": 3})
    assert len(caught.value.problems) == 4
    assert "plain, streaming or fake" in str(caught.value)
    assert "'checkpiont' is unknown" in str(caught.value)


def test_values_that_contradict_each_other_are_refused():
    with pytest.raises(ParameterError, match="at most half of 'frame_interval_s'"):
        parameters_from({"frame_tolerance_s": 0.06})
    for device in ("gpu", "cuda:", "cuda:x"):
        with pytest.raises(ParameterError, match="device"):
            parameters_from({"device": device})
    assert parameters_from({"device": "cuda:1"}).device == "cuda:1"
    with pytest.raises(ParameterError, match="'ingest' must be false with engine 'plain'"):
        parameters_from({"ingest": True})
    assert parameters_from({"ingest": True, "engine": "streaming"}).ingest


def test_descriptors_show_range_unit_and_read_only_flag():
    age = descriptor(SPECS["max_result_age_s"])
    assert (age.floating_point_range[0].from_value, age.floating_point_range[0].to_value) == (0.05, 60.0)
    assert "[s]" in age.description
    samples = descriptor(SPECS["num_samples"])
    assert (samples.integer_range[0].from_value, samples.integer_range[0].to_value) == (1, 64)
    for spec in SPECS.values():
        assert descriptor(spec).read_only == (spec.changes == AT_START)


def test_the_plain_engine_needs_a_checkpoint():
    with pytest.raises(ParameterError, match="'checkpoint' is required"):
        choose_engine(Parameters(), load_rig("sample"))


def test_a_probe_that_is_none_is_refused():
    with pytest.raises(ParameterError, match="probe"):
        choose_engine(Parameters(engine="fake", fake_probe="no.such:thing"), load_rig("sample"))


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The node's executable, run to its end."""
    executable = Path(sys.executable).with_name("flashdrive_node")
    return subprocess.run([executable, *arguments], capture_output=True, text=True, timeout=30)


def test_a_start_with_bad_parameters_ends_with_all_reasons(tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text(
        "/**:\n  ros__parameters:\n    max_result_age_s: -1.0\n    top_p: high\n    hang_timeout_s: 700\n"
    )
    ended = start("--ros-args", "--params-file", str(params), "-p", "engine:=quick")
    assert ended.returncode == 2
    for part in (
        "0.05 to 60 s",
        "found -1.0",
        "'high'",
        "0.1 to 600 s (float), found 700.0",
        "plain, streaming or fake",
    ):
        assert part in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_start_with_an_unknown_rig_says_which_there_are():
    ended = start("--ros-args", "-p", "rig:=tractor")
    assert ended.returncode == 2
    assert "sample" in ended.stderr
    assert "Traceback" not in ended.stderr
