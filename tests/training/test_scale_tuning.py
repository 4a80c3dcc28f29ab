"""Scales that are learned together: exact products and gradients, less error, never worse, and going on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from flashdrive_node.model.givens import random_pairs
from flashdrive_node.model.int4 import dequantise
from flashdrive_node.model.int4 import quantise as round_to_nearest
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.paro_layouts import GROUP_SIZE, ROUNDS
from flashdrive_node.model.paroquant import ParoWeight, round_tokens
from flashdrive_node.model.precision import PRESETS
from flashdrive_node.training import scale_tuning
from flashdrive_node.training.layer_inputs import InputSettings
from flashdrive_node.training.quantisation import QuantisationReport, quantise_checkpoint
from flashdrive_node.training.rotation_fit import FitSettings
from flashdrive_node.training.scale_tuning import State, TunedProduct, tune_scales
from flashdrive_node.training.stack_error import RoundedProduct, stack_error
from flashdrive_node.training.text_windows import TextWindow, split_windows
from support.painted_clips import PaintedClips, painted_model, painted_windows, to_the_nearest


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return painted_model(tmp_path_factory.mktemp("plain"), layers=2)


@pytest.fixture(scope="module")
def windows(loaded: LoadedModel) -> list[TextWindow]:
    return painted_windows(loaded)


def random_layer(rows: int, groups: int, seed: int) -> ParoWeight:
    draws = torch.Generator().manual_seed(seed)
    columns = groups * GROUP_SIZE
    return ParoWeight(
        random_pairs(columns, ROUNDS, GROUP_SIZE, draws),
        torch.randn(ROUNDS, columns // 2, generator=draws).half(),
        (torch.rand(columns, generator=draws) + 0.5).half(),
        round_to_nearest(torch.randn(rows, columns, generator=draws), GROUP_SIZE),
    )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 24),
    groups=st.integers(1, 3),
    tokens=st.integers(1, 7),
    int8_inputs=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_product_and_gradients(rows: int, groups: int, tokens: int, int8_inputs: bool, seed: int) -> None:
    """As the layer before anything is learned, and as plain differentiation of the same product in float64."""
    layer = random_layer(rows, groups, seed)
    product = TunedProduct(layer, int8_inputs, torch.float32)
    draws = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(2, tokens, groups * GROUP_SIZE, generator=draws, requires_grad=True)
    torch.testing.assert_close(product(x), RoundedProduct(layer, int8_inputs, torch.float32)(x))
    with torch.no_grad():
        product.factors.copy_(0.1 * torch.randn(rows, groups, generator=draws))
    wanted = torch.randn(2, tokens, rows, generator=draws)
    found = torch.autograd.grad((product(x) * wanted).sum(), (x, product.factors))

    factors = product.factors.detach().double().requires_grad_()
    steps = dequantise(layer.matrix._replace(scales=torch.ones_like(layer.matrix.scales))).double()
    scales = layer.matrix.scales.double() * (1 + factors)
    matrix = (steps.unflatten(1, (groups, -1)) * scales[..., None]).flatten(1)
    turned = product.layer.rotated_at_once(x)
    q, token_scales = round_tokens(turned.detach())
    rounding = q * token_scales - turned.detach() if int8_inputs else torch.zeros_like(turned)
    expected = torch.autograd.grad((linear((turned + rounding).double(), matrix) * wanted).sum(), (x, factors))
    for ours, theirs in zip(found, expected, strict=True):
        # Sums of a few hundred products in float32; those that cancel are judged by the largest.
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("int8_inputs", [True, False])
def test_learned_scales_are_closer(
    loaded: LoadedModel, windows: list[TextWindow], int8_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_tuning, "_RATE", 4e-3)
    layers = to_the_nearest(loaded)
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    found = tune_scales(loaded.model, layers, windows, FitSettings(int8_inputs=int8_inputs, tuning_passes=10))
    first, after = (stack_error(loaded.model, x, windows, int8_inputs) for x in (layers, found))
    assert after.summed < 0.9 * first.summed
    assert after.velocity < 0.9 * first.velocity
    assert after.states < first.states
    assert list(found) == list(layers)
    for name, layer in found.items():
        assert torch.equal(layer.matrix.codes, layers[name].matrix.codes)
        assert torch.equal(layer.matrix.zeros, layers[name].matrix.zeros)
        assert layer.shares_input_with(layers[name])
        assert layer.matrix.scales.dtype == torch.float16
        assert not torch.equal(layer.matrix.scales, layers[name].matrix.scales)
    assert all(map(torch.equal, before, loaded.model.parameters()))
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert type(loaded.model.language.layers[0].qkv) is torch.nn.Linear


def test_what_is_no_better_is_left(
    loaded: LoadedModel, windows: list[TextWindow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_tuning, "_RATE", 1.0)
    layers = to_the_nearest(loaded)
    found = tune_scales(loaded.model, layers, windows, FitSettings(tuning_passes=1))
    assert all(found[name] is layer for name, layer in layers.items())


@pytest.mark.parametrize("count", range(1, 12))
def test_the_last_fifth_chooses(count: int, windows: list[TextWindow]) -> None:
    many = [windows[i % 3] for i in range(count)]
    learned, choosing = split_windows(many)
    if count < 5:
        assert learned == choosing == many
    else:
        assert [*learned, *choosing] == many
        assert len(choosing) == count // 5


def test_goes_on_from_what_was_kept(
    loaded: LoadedModel, windows: list[TextWindow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind any step, the rest is the same to the bit."""
    monkeypatch.setattr(scale_tuning, "_KEPT_EVERY", 2)
    monkeypatch.setattr(scale_tuning, "_RATE", 4e-3)
    layers, fitting = to_the_nearest(loaded), FitSettings(tuning_passes=4, seed=3)
    states: list[State] = []

    def keep(state: State) -> None:
        states.append(({name: tensor.clone() for name, tensor in state[0].items()}, state[1]))

    whole = tune_scales(loaded.model, layers, windows, fitting, None, keep)
    assert [steps for _, (steps,) in states] == [2, 4, 6]
    losses: list[Tensor] = []
    original = cast(Callable[..., Tensor], scale_tuning._loss)
    monkeypatch.setattr(scale_tuning, "_loss", lambda *given: losses.append(original(*given)) or losses[-1])
    for state, left in zip(states, (8, 4, 0), strict=True):
        losses.clear()
        again = tune_scales(loaded.model, layers, windows, fitting, state)
        assert len([loss for loss in losses if loss.requires_grad]) == left
        for name, layer in whole.items():
            assert torch.equal(again[name].matrix.scales, layer.matrix.scales), name


def test_quantisation_goes_on_in_the_middle_of_learning(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = InputSettings(windows=4, stride=1, rows=64)
    fitting = FitSettings(steps=3, rows=16, tuning_passes=3)

    def quantise(name: str, fit: FitSettings = fitting) -> tuple[QuantisationReport, bytes]:
        out = tmp_path / name
        report = quantise_checkpoint(
            loaded, PaintedClips(), PRESETS["w4a8"], out, loaded.info.path / "vlm", inputs, fit
        )
        return report, (out / "model.safetensors").read_bytes()

    monkeypatch.setattr(scale_tuning, "_RATE", 4e-3)
    monkeypatch.setattr(scale_tuning, "_KEPT_EVERY", 1)
    whole = quantise("whole")
    original, computed = cast(Callable[..., Tensor], scale_tuning._loss), 0

    def counted(*args: object) -> Tensor:
        nonlocal computed
        computed += 1
        if computed == 6:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(scale_tuning, "_loss", counted)
    with pytest.raises(KeyboardInterrupt):
        quantise("out")
    assert quantise("out") == whole
    # 3 passes over 3 windows, two windows a step: the sixth is computed again with the fifth; all choose, twice.
    assert computed == 9 + 2 + 2 * 3
    report, plain = quantise("without", replace(fitting, tuning_passes=0))
    assert list(report.together) == ["alone", "in_order"]
    assert report.together["in_order"] == whole[0].together["in_order"]
    assert whole[0].together["tuned"].summed < report.together["in_order"].summed
    assert plain != whole[1]
