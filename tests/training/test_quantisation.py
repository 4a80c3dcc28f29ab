"""A whole checkpoint quantised: what is written, what is reported, and going on after an interruption."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.fp8 import Fp8Linear
from flashdrive_node.model.int4 import quantise as round_to_nearest
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.model.paroquant import ParoLinear
from flashdrive_node.model.precision import PRESETS, StagePrecision
from flashdrive_node.training import quantisation
from flashdrive_node.training.head_check import check_head
from flashdrive_node.training.layer_inputs import InputSettings, LayerInputs, collect_inputs
from flashdrive_node.training.quantisation import (
    QuantisationReport,
    layers_in,
    quantisable,
    quantise_checkpoint,
)
from flashdrive_node.training.quantisation_report import markdown, write_report
from flashdrive_node.training.rotation_fit import FitSettings, fit
from support.painted_clips import PaintedClips, painted_model, painted_observation

INPUTS, FITTING = InputSettings(windows=3, stride=1, rows=16), FitSettings(steps=3, rows=16)


_STREAMING = StreamingSettings("loaded", device="cpu", stream=StreamSettings("features"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return painted_model(tmp_path_factory.mktemp("plain"))


def quantise(
    loaded: LoadedModel, out: Path, stages: StagePrecision = PRESETS["w4a8"], fitting: FitSettings = FITTING
) -> QuantisationReport:
    return quantise_checkpoint(loaded, PaintedClips(), stages, out, loaded.info.path / "vlm", INPUTS, fitting)


@pytest.fixture(scope="module")
def done(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantisationReport]:
    out = tmp_path_factory.mktemp("quantised") / "out"
    return out, quantise(loaded, out)


def test_checkpoint_drives(done: tuple[Path, QuantisationReport]) -> None:
    out, report = done
    small = [layer.layer for layer in report.layers if layer.format == "w4a8"]
    assert small == [f"language.layers.0.{x}" for x in ("qkv", "gate_up", "down")]
    floats = {layer.layer.partition(".")[0] for layer in report.layers if layer.format == "fp8"}
    assert floats == {"vision", "expert"}
    assert report.left_out == ["language.layers.0.o_proj"]
    assert all(0 < layer.error < 0.3 and 0 < layer.nearest_error < 0.3 for layer in report.layers)
    assert not out.with_name("out.parts").exists()
    loaded = load_alpamayo(out, dtype=torch.float32)
    assert isinstance(loaded.model.language.layers[0].qkv, ParoLinear)
    prediction = PlainEngine(PlainSettings("loaded", device="cpu"), loaded).step(painted_observation(9))
    assert np.isfinite(prediction.samples[0].xyz).all()


def test_report(done: tuple[Path, QuantisationReport], tmp_path: Path) -> None:
    write_report(done[1], tmp_path)
    text = (tmp_path / "quantisation.md").read_text()
    assert text == markdown(done[1]) + "\n"
    assert "| language.layers.0.down | 128 x 128 |" in text
    assert "no whole groups: language.layers.0.o_proj" in text
    assert (tmp_path / "quantisation.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "quantisation.json").read_text())["layers"][0]["rows"] == 128


def test_interrupted_and_gone_on(
    loaded: LoadedModel,
    done: tuple[Path, QuantisationReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[int] = []
    original = quantisation.fit

    def counted(weight: torch.Tensor, *args: object) -> object:
        fitted.append(len(weight))
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return original(weight, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(quantisation, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        quantise(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = quantise(loaded, tmp_path / "out")
    assert len(fitted) == 4  # three layers, one of them twice
    assert report.layers == done[1].layers
    weights = [(folder / "model.safetensors").read_bytes() for folder in (done[0], tmp_path / "out")]
    assert weights[0] == weights[1]


def test_rows_are_of_prompt_and_text_and_of_different_windows(loaded: LoadedModel) -> None:
    names, _ = quantisable(loaded.model)
    met = collect_inputs(loaded, PaintedClips(), names, INPUTS)
    for name in names:
        # Two windows to fit on and one held out, each with rows of the prompt and of the text.
        assert 2 * 16 < len(met.fit[name]) <= 4 * 16
        assert 16 < len(met.held_out[name]) <= 2 * 16
        assert met.fit[name].shape[1] == 128


def test_settings_and_models_that_cannot_be_used(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 windows"):
        InputSettings(windows=1)
    nearest = FitSettings("nearest")
    with pytest.raises(InputError, match=r"a precision that needs a calibration .* found fp8"):
        quantise_checkpoint(loaded, PaintedClips(), PRESETS["fp8"], tmp_path / "x", None, INPUTS, nearest)
    with pytest.raises(InputError, match="a method of paroquant, nearest is required, found 'gptq'"):
        FitSettings("gptq")
    with pytest.raises(InputError, match="positive steps"):
        FitSettings(steps=0)


def test_rounding_to_the_nearest_turns_nothing(loaded: LoadedModel, tmp_path: Path) -> None:
    report = quantise(loaded, tmp_path / "out", fitting=FitSettings("nearest", rows=16))
    assert all(layer.error == layer.rotated_error == layer.nearest_error > 0 for layer in report.layers)
    model = load_alpamayo(tmp_path / "out", dtype=torch.float32).model
    for layer in report.layers:
        found = model.get_submodule(layer.layer)
        assert isinstance(found, ParoLinear)
        assert found.angles.abs().max() == 0
        plain = loaded.model.get_submodule(layer.layer).get_parameter("weight")
        assert torch.equal(found.matrix.codes, round_to_nearest(plain, 128).codes)


def test_static_scales_and_a_head_in_four_bits(loaded: LoadedModel, tmp_path: Path) -> None:
    stages = StagePrecision(vision="fp8_static", expert="fp8_static", lm_head="int4")
    report = quantise(loaded, tmp_path / "out", stages)
    assert {layer.format for layer in report.layers} == {"fp8"}
    assert report.static == len(layers_in(loaded.model, stages, "fp8_static")) > 8
    assert report.head is not None
    assert report.head.tokens > 10
    assert report.stages["lm_head"] == ("int4" if report.head.changed == 0 else "int8")
    write_report(report, tmp_path)
    assert (tmp_path / "quantisation.png").is_file()
    assert f"changed behind {report.head.changed} of {report.head.tokens} tokens" in markdown(report)
    model = load_alpamayo(tmp_path / "out", dtype=torch.float32)
    layer = model.model.vision.blocks[0].fc1
    assert isinstance(layer, Fp8Linear)
    assert layer.input_scale is not None
    engines = PlainEngine(PlainSettings("loaded", device="cpu"), model), StreamingEngine(_STREAMING, model)
    plain, streaming = (engine.step(painted_observation(9)).samples[0] for engine in engines)
    assert np.isfinite(plain.xyz).all()
    assert streaming.reasoning == plain.reasoning
    np.testing.assert_allclose(streaming.xyz, plain.xyz, atol=0.5, rtol=0.05)


def test_floats_are_read_as_they_were_chosen(loaded: LoadedModel, tmp_path: Path) -> None:
    """By whoever rounds rows, and in bfloat16 by whoever does not; the text layers are among them."""
    report = quantise(loaded, tmp_path / "out", PRESETS["fp8"])
    assert {layer.layer.partition(".")[0] for layer in report.layers} == {"vision", "language", "expert"}
    assert all(layer.error <= layer.nearest_error for layer in report.layers)
    assert any(layer.error < 0.9 * layer.nearest_error for layer in report.layers)
    plain = load_alpamayo(tmp_path / "out", dtype=torch.float32, precision=PRESETS["bf16"]).model
    model = load_alpamayo(tmp_path / "out", dtype=torch.float32).model  # as its config.json says
    for layer in report.layers:
        found = model.get_submodule(layer.layer)
        assert isinstance(found, Fp8Linear)
        if layer.error < layer.nearest_error:
            assert torch.equal(found.dequantised(), plain.get_submodule(layer.layer).get_parameter("weight"))
    assert "Layers in 8-bit floats" in markdown(report)
    assert "4-bit layers" not in markdown(report)


def test_floats_interrupted_and_gone_on(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = StagePrecision(vision="fp8_static", expert="fp8")
    whole = quantise(loaded, tmp_path / "whole", stages)
    original, fitted = quantisation.fit_float, 0

    def counted(*args: torch.Tensor) -> object:
        nonlocal fitted
        fitted += 1
        if fitted == len(whole.layers):
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(quantisation, "fit_float", counted)
    with pytest.raises(KeyboardInterrupt):
        quantise(loaded, tmp_path / "out", stages)
    report = quantise(loaded, tmp_path / "out", stages)
    assert fitted == len(report.layers) + 1
    assert report == whole
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "out")]
    assert configs[0]["largest_inputs"] == configs[1]["largest_inputs"]
    assert len(configs[0]["largest_inputs"]) == report.static > 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("noise", "kept"), [(0.0, True), (2.0, False)])
def test_head_is_kept_in_four_bits_where_no_token_changes(loaded: LoadedModel, noise: float, kept: bool) -> None:
    """States that point along one row of the head are decided by far; states at random are not."""
    head = loaded.model.language.lm_head
    generator = torch.Generator().manual_seed(3)
    rows = head.weight[torch.arange(0, 40)] / head.weight[:40].norm(dim=1, keepdim=True)
    states = rows + noise * torch.randn(rows.shape, generator=generator)
    found = check_head(loaded.model, LayerInputs({"language.lm_head": states}, {"language.lm_head": states[:8]}))
    assert found.tokens == 48
    assert found.kept == kept == (found.changed == 0)


def test_second_stage_lowers_the_error_on_other_inputs() -> None:
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(128, 128, generator=generator) * torch.logspace(0, -2, 128)
    weight = torch.randn(64, 128, generator=generator) * 0.02
    inputs, held_out = (torch.randn(rows, 128, generator=generator) @ mix for rows in (600, 200))
    done = fit(weight, inputs, held_out, FitSettings(steps=30, int8_inputs=False))
    assert done.error < 0.9 * done.rotated_error
    assert done.rotated_error <= done.nearest_error
