"""Text layers that are rounded behind each other: states as in the model, less error together, and going on."""

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model.decoder import DecoderLayer
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.paroquant import ParoWeight
from flashdrive_node.model.precision import PRESETS
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.training import stack_rounding
from flashdrive_node.training.layer_inputs import InputSettings
from flashdrive_node.training.quantisation import QuantisationReport, quantise_checkpoint
from flashdrive_node.training.quantisation_report import markdown
from flashdrive_node.training.rotation_fit import FitSettings
from flashdrive_node.training.stack_error import FlowPoints, StackError, answer, stack_error
from flashdrive_node.training.stack_rounding import PARTS, round_in_order
from flashdrive_node.training.text_windows import TextWindow, recorded_window
from support.painted_clips import PaintedClips, painted_model, painted_observation, painted_windows, to_the_nearest

INPUTS, FITTING = InputSettings(windows=4, stride=1, rows=64), FitSettings(steps=3, rows=16)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return painted_model(tmp_path_factory.mktemp("plain"), layers=3)


@pytest.fixture(scope="module")
def windows(loaded: LoadedModel) -> list[TextWindow]:
    return painted_windows(loaded)


def test_window_is_what_the_engine_read_and_wrote(loaded: LoadedModel) -> None:
    """Read at once, the recorded tokens are each the likeliest behind those in front of it."""
    model = loaded.model
    engine = PlainEngine(PlainSettings("loaded", device="cpu", sampling=SamplingSettings(temperature=0)), loaded)
    with recorded_window(model.language) as found:
        engine.step(painted_observation(3))
    (window,) = found
    cache = KVCache(model.config.text, len(window.ids), "cpu", torch.float32)
    tokens = model.config.tokens
    never = slice(tokens.traj_token_start, tokens.traj_token_start + tokens.traj_vocab_size)
    with torch.inference_mode():
        states = model.language(window.ids, window.positions, cache, None, window.features, window.image_index)
        logits = model.language.logits(states[window.prompt - 1 :])
        logits[:, never] = -torch.inf
        likeliest = logits.argmax(dim=-1)
    assert len(window.ids) - window.prompt > 3
    assert torch.equal(likeliest[:-1], window.ids[window.prompt :])


def test_velocities_are_what_the_engine_took(loaded: LoadedModel) -> None:
    """The expert's steps behind prompt and text, once more at the same points behind the window that was recorded."""
    taken: list[tuple[Tensor, Tensor, Tensor]] = []
    watch = loaded.model.expert.register_forward_hook(lambda _, given, v: taken.append((given[0], given[1], v)))
    words = 0

    def end_after_five(_: torch.nn.Module, __: object, logits: Tensor) -> None:
        nonlocal words
        words += 1
        if words > 5:
            logits[..., loaded.model.config.tokens.future_start] = 1e4

    ending = loaded.model.language.lm_head.register_forward_hook(end_after_five)
    engine = PlainEngine(PlainSettings("loaded", device="cpu", sampling=SamplingSettings(temperature=0)), loaded)
    with watch, ending, recorded_window(loaded.model.language) as found:
        engine.step(painted_observation(2))
    assert len(found[0].ids) - found[0].prompt == 6
    assert len(taken) == loaded.model.config.flow.num_inference_steps
    x, t, v = (torch.stack(tensors)[None].clone() for tensors in zip(*taken, strict=True))
    with torch.no_grad():
        again = answer(loaded.model, found[0], FlowPoints(x, t)).velocity
    torch.testing.assert_close(again, v.view_as(again), atol=1e-5, rtol=1e-5)


def test_states_of_the_walk_are_the_models(loaded: LoadedModel, windows: list[TextWindow]) -> None:
    model = loaded.model
    walk = stack_rounding._Walk(model, windows)
    with torch.no_grad():
        for number, layer in enumerate(model.language.layers):
            for part in PARTS:
                walk.passed(cast(DecoderLayer, layer), part, number)
        for window, found in zip(windows, walk.states, strict=True):
            cache = KVCache(model.config.text, len(window.ids), "cpu", torch.float32)
            expected = model.language(window.ids, window.positions, cache, None, window.features, window.image_index)
            torch.testing.assert_close(model.language.norm(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("int8_inputs", [True, False])
def test_layers_behind_each_other_are_closer_together(
    loaded: LoadedModel, windows: list[TextWindow], int8_inputs: bool
) -> None:
    layers = to_the_nearest(loaded)
    found: dict[str, ParoWeight] = {}
    settings = FitSettings(int8_inputs=int8_inputs)
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    round_in_order(loaded.model, layers, windows, 200, settings, {}, found.__setitem__)
    assert list(found) == [name for n in range(3) for p in PARTS if (name := f"language.layers.{n}.{p}") in layers]
    alone, together = (stack_error(loaded.model, x, windows, int8_inputs) for x in (layers, found))
    assert together.states < 0.9 * alone.states
    assert together.keys_values < 0.9 * alone.keys_values
    assert together.tokens == alone.tokens == sum(len(w.ids) - w.prompt + 1 for w in windows)
    assert all(map(torch.equal, before, loaded.model.parameters()))
    assert type(loaded.model.language.layers[0].qkv) is torch.nn.Linear


def test_nothing_rounded_is_no_error(loaded: LoadedModel, windows: list[TextWindow]) -> None:
    error = stack_error(loaded.model, {}, windows, int8_inputs=True)
    tokens = sum(len(w.ids) - w.prompt + 1 for w in windows)
    assert error == StackError(0, 0, 0, 0, 0, tokens, 0)


def quantise(loaded: LoadedModel, out: Path, fitting: FitSettings = FITTING) -> QuantisationReport:
    stages = PRESETS["w4a8"]
    return quantise_checkpoint(loaded, PaintedClips(), stages, out, loaded.info.path / "vlm", INPUTS, fitting)


def test_report_and_layers_alone(loaded: LoadedModel, tmp_path: Path) -> None:
    report = quantise(loaded, tmp_path / "together")
    assert list(report.together) == ["alone", "in_order", "tuned"]
    assert report.together["alone"] != report.together["in_order"]
    row = report.together["tuned"]
    assert f"| with scales learned together | {100 * row.keys_values:.2f} % |" in markdown(report)
    alone = quantise(loaded, tmp_path / "alone", FitSettings(steps=3, rows=16, in_order=False))
    assert alone.together == {}
    assert "together" not in markdown(alone)
    files = [tmp_path / name / "model.safetensors" for name in ("together", "alone")]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_interrupted_and_gone_on(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantise(loaded, tmp_path / "whole")
    original, rounded = stack_rounding.rounded_towards, 0

    def counted(*args: object) -> ParoWeight:
        nonlocal rounded
        rounded += 1
        if rounded == 5:
            raise KeyboardInterrupt
        return original(*cast(tuple[ParoWeight, Tensor, Tensor, Tensor, FitSettings], args))

    monkeypatch.setattr(stack_rounding, "rounded_towards", counted)
    with pytest.raises(KeyboardInterrupt):
        quantise(loaded, tmp_path / "out")
    assert quantise(loaded, tmp_path / "out") == whole
    assert rounded == len([x for x in whole.layers if x.format == "w4a8"]) + 1
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
