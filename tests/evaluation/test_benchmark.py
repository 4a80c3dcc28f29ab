"""The benchmark command runs every configuration over one set of weights, and says under which conditions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdrive_node.cli import benchmark as command
from flashdrive_node.cli.main import main
from flashdrive_node.engine.protocol import Prediction
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.benchmark import (
    Measurement,
    StageTimes,
    _stages_ms,
    _take_ahead,
    make_engine,
    measure,
)
from flashdrive_node.evaluation.benchmark_figure import figure_png
from flashdrive_node.evaluation.benchmark_report import STAGES, Report, markdown, read_report
from flashdrive_node.evaluation.configurations import CONFIGURATIONS, Procedure, window_workload
from flashdrive_node.evaluation.random_drive import RandomDrive
from flashdrive_node.evaluation.random_networks import random_drafter, random_model
from flashdrive_node.evaluation.roofline import Ceilings, stage_floors
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.source import read_config
from support.narrow_release import small_alpamayo

CHECKPOINT = Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"
QUICK = ["--device", "cpu", "--precision", "float32", "--image-size", "180x320", "--runs", "2", "--warm-up", "1"]
CEILINGS = Ceilings(1e12, 1e11, 1e10)


def test_tables_picture_and_files(tmp_path, capsys):
    arguments = ["benchmark", str(CHECKPOINT), *QUICK, "--tokens", "4", "--samples", "2"]
    arguments += ["--accept-length", "1.5", "--configurations", "all", "--out", str(tmp_path)]
    arguments += ["--draft-vocabulary", "50"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "weights: from the checkpoint" in out
    assert "accept length: 1.5, an input: 2 rounds" in out
    assert "drafter: random, of the published dimensions, guesses among 50 tokens" in out
    report = json.loads((tmp_path / "benchmark.json").read_text())
    kinds = [(m["configuration"], m["samples"]) for m in report["measurements"]]
    assert kinds == [("all", 2)]
    for measurement in report["measurements"]:
        assert measurement["windows"] == 2
        assert {*STAGES, "total"} == measurement["stages"].keys()
        for stage in measurement["stages"].values():
            assert 0 <= stage["min_ms"] <= stage["p50_ms"] <= stage["p99_ms"]
        assert {*STAGES, "total"} - {"other"} == measurement["floors"].keys()
        assert measurement["stages"]["total"]["min_ms"] > 0
    assert (tmp_path / "benchmark.md").read_text().strip() in out
    png = (tmp_path / "benchmark.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    # Tables and picture come back from the file alone.
    assert main(["benchmark", "--redraw", str(tmp_path / "benchmark.json"), "--out", str(tmp_path / "again")]) == 0
    for name in ("benchmark.json", "benchmark.md", "benchmark.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.fixture(scope="module")
def loaded():
    return random_model(small_alpamayo(), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def drive(loaded):
    # Small frames are made larger by the model's own rule: 180 tokens a frame as from a large one.
    return RandomDrive(loaded.model.config, (90, 160), (0, 6), 4)


SETTINGS = PlainSettings("random", device="cpu", precision="float32", cameras=(0, 6), image_size=(90, 160))
PROCEDURE = Procedure(tokens=6, accept_length=2.5, warm_up=1, runs=1)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_a_configuration_computes(loaded, drive, name):
    """The engine's own figures of a window behind the first are those that the floor is computed from."""
    settings = replace(SETTINGS, samples=2)
    work = window_workload(loaded, drive, CONFIGURATIONS[name], PROCEDURE, 2)
    engine = make_engine(name, PROCEDURE, settings, loaded, random_drafter(loaded.model))
    engine.step(drive.window(0))
    if CONFIGURATIONS[name].ahead:
        _take_ahead(engine, drive.window(1))
    metrics = engine.step(drive.window(1)).metrics
    streams = isinstance(engine, StreamingEngine)
    assert streams == (name != "plain")
    assert work.prompt_tokens == metrics["prompt_tokens"]
    assert work.computed_tokens == metrics.get("computed_tokens", work.prompt_tokens)
    assert len(work.patches) == metrics.get("new_images", 8)
    assert work.frame_bytes == len(work.patches) * 90 * 160 * 3
    assert work.evaluations == (4 if CONFIGURATIONS[name].flow else 10)
    assert work.rounds == (2 if CONFIGURATIONS[name].speculative else None)
    assert metrics["tokens"] == work.tokens == 6
    assert metrics.get("draft_rounds") == work.rounds
    assert work.prefill_pairs <= work.prompt_tokens * (work.prompt_tokens + 1) // 2
    if name == "plain":
        assert work.prefill_pairs == work.prompt_tokens * (work.prompt_tokens + 1) // 2


def test_measuring_leaves_the_weights(loaded, drive):
    drafter = random_drafter(loaded.model)
    before = [p.clone() for p in loaded.model.parameters()]
    found = measure("all", PROCEDURE, SETTINGS, loaded, drafter, drive, CEILINGS)
    for parameter, kept in zip(loaded.model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
    assert found.passes == found.work.rounds == 2
    assert replace(found, work=replace(found.work, rounds=None)).passes == 6
    assert found.windows == PROCEDURE.runs
    floors = stage_floors(loaded.model.config, found.work, 4, CEILINGS, drafter.config)
    assert found.floors == floors
    assert found.warm_up_s > found.reset_ms / 1e3 >= 0


def test_rounds_are_those_of_the_accept_length(loaded):
    """A text that took 5 rounds counts as the 2 of the accept length, each as long as measured."""
    timings = {"encode": 10.0, "decode": 50.0, "action": 5.0, "total": 70.0}
    prediction = Prediction(0, 0, (), 0, 0.0, timings, {"draft_rounds": 5.0})
    assert _stages_ms(prediction, 2) == {"encode": 10, "decode": 20, "action": 5, "other": 5, "total": 40}
    assert _stages_ms(prediction, None) == {"encode": 10, "decode": 50, "action": 5, "other": 5, "total": 70}
    assert Procedure().rounds == 3
    assert Procedure(tokens=16, accept_length=7.5).rounds == 2
    assert Procedure(tokens=17, accept_length=1).rounds == 16
    assert Procedure().gain == 5
    assert Procedure(tokens=10, accept_length=1.5).gain == 2
    with pytest.raises(InputError, match="at most the drafter's block of 8, found 15"):
        make_engine("all", Procedure(accept_length=15), SETTINGS, loaded, random_drafter(loaded.model))


def report_of(loaded, drive, medians: dict[str, float]) -> Report:
    work = window_workload(loaded, drive, CONFIGURATIONS["plain"], PROCEDURE, 1)
    floors = stage_floors(loaded.model.config, work, 4, CEILINGS)
    stages = {stage: StageTimes(ms, 2 * ms, ms) for stage, ms in medians.items()}
    measurement = Measurement("plain", 1, 1, work, stages, floors, 3 * 2**30, 1.5, 0.25)
    conditions = {"device": "card", "precision": "bfloat16", "weights": "random: no accuracy"}
    return Report(conditions, CEILINGS, [measurement], {"seconds": 1.0}, {"all, 6 samples": "out of memory"})


def test_tables_say_what_was_found(tmp_path, loaded, drive):
    medians = {"images": 3.0, "encode": 10.0, "prefill": 40.0, "decode": 60.0, "action": 30.0, "other": 2.0}
    report = report_of(loaded, drive, medians | {"total": 150.0})
    lines = markdown(report).splitlines()
    assert lines[0].split(" | ")[3:9] == list(STAGES)
    p50 = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    p99 = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert p50[:9] == ["plain", "1", "p50", "3.0", "10.0", "40.0", "60.0", "30.0", "2.0"]
    floor = report.measurements[0].floors["total"].ms
    assert p50[9:] == ["10.00", "**150.0**", f"{floor:.1f}", f"{150 / floor:.2f}", "3.0"]
    assert p99[3:11] == ["6.0", "20.0", "80.0", "120.0", "60.0", "4.0", "20.00", "300.0"]
    encode = report.measurements[0].floors["encode"].ms
    assert f"{encode:.2f} ({10 / encode:.1f})" in lines[7]
    assert "1 TFLOP/s in a large matrix product, 0.1 TB/s" in lines[9]
    assert "Not measured: all, 6 samples: out of memory" in lines
    path = tmp_path / "benchmark.json"
    path.write_text(report.as_json())
    assert read_report(path) == report
    assert figure_png(report).startswith(b"\x89PNG")
    path.write_text("{}")
    with pytest.raises(InputError, match=r"benchmark\.json of this command is required"):
        read_report(path)


def test_a_failing_configuration_does_not_lose_the_others(tmp_path, monkeypatch, capsys, loaded, drive):
    def fails(name, *rest):
        if name == "flow":
            raise RuntimeError("out of memory")
        stages = dict.fromkeys((*STAGES, "total"), 1.0)
        return replace(report_of(loaded, drive, stages).measurements[0], configuration=name)

    monkeypatch.setattr(command, "measure", fails)
    arguments = ["benchmark", str(CHECKPOINT), *QUICK, "--tokens", "3", "--samples", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--configurations", "flow", "streaming"]) == 1
    assert "Not measured: flow, 1 sample(s): out of memory" in capsys.readouterr().out
    report = read_report(tmp_path / "benchmark.json")
    assert [m.configuration for m in report.measurements] == ["streaming"]
    assert report.failures == {"flow, 1 sample(s)": "out of memory"}


def test_windows_share_all_but_the_newest_frame():
    drive = RandomDrive(read_config(CHECKPOINT), (8, 8), (0, 6), 4)
    one, two = drive.window(5), drive.window(6)
    for before, after in zip(one.cameras, two.cameras, strict=True):
        assert before.stamps_ns[1:] == after.stamps_ns[:-1]
        assert all(a is b for a, b in zip(before.images[1:], after.images[:-1], strict=True))
        assert not any(after.images[-1] is image for image in before.images)
    assert two.t0_ns - one.t0_ns == 100_000_000
    assert np.ptp(one.cameras[0].images[0]) > 200  # random pixels, not one colour


def test_percentiles():
    times = StageTimes.of([float(i) for i in range(1, 102)])
    assert (times.p50_ms, times.p99_ms, times.min_ms) == (51, 100, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a checkpoint or --dims is required"),
        (["x", "--dims", "10b"], "either a checkpoint or --dims is required"),
        (["--dims", "10b"], "--dims needs --random-weights or --load-from"),
        (["x", "--image-size", "big"], "--image-size must be HEIGHTxWIDTH, found 'big'"),
        (["x", "--flow-schedule", "8:1"], "evaluated steps must start with 0"),
        (["x", "--samples", "1", "0"], "samples must be at least 1, found 0"),
        (["x", "--tokens", "1", "--runs", "0"], "tokens must be at least 2, found 1; runs must be at least 1, found 0"),
        (["x", "--accept-length", "nan"], "accept_length must be at least 1, found nan"),
        (["x", "--accept-length", "0.9"], "accept_length must be at least 1, found 0.9"),
        (["x", "--precision", "w3"], "precision must be one of auto"),
        (["x", "--draft-vocabulary", "0"], "--draft-vocabulary must be at least 1, found 0"),
        (["--redraw", "missing.json"], "No such file"),
    ],
)
def test_bad_requests_end_with_one_message(capsys, arguments, message):
    assert main(["benchmark", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said(capsys):
    assert main(["benchmark", "--dims", "10b", "--random-weights", "--device", "cuda"]) == 2
    assert "--device cuda needs a CUDA device, found none" in capsys.readouterr().err
