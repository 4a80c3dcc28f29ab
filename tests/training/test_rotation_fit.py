"""Rotations that are fitted lose less than rounding to the nearest, and never more on what they are fitted on."""

import pytest
import torch
from torch import Tensor

from flashdrive_node.model.errors import InputError
from flashdrive_node.training.rotation_fit import Fit, FitSettings, fit, output_error

SETTINGS = FitSettings(steps=25, rows=64, rate=0.03)


def layer_with_outliers(seed: int) -> tuple[Tensor, Tensor]:
    """A weight [32, 128] and inputs [512, 128] in which some channels are thirty times the others."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.ones(128)
    channels[::16] = 30
    weight = torch.randn(32, 128, generator=generator) * torch.where(channels > 1, 3.0, 1.0)
    return weight, torch.randn(512, 128, generator=generator) * channels


def fitted(weight: Tensor, inputs: Tensor, settings: FitSettings = SETTINGS) -> Fit:
    return fit(weight, inputs[:384], inputs[384:], settings)


@pytest.mark.parametrize("int8_inputs", [True, False])
def test_rotation_buys_something(int8_inputs: bool) -> None:
    weight, inputs = layer_with_outliers(0)
    steps: list[int] = []
    settings = FitSettings(steps=25, rows=64, rate=0.03, int8_inputs=int8_inputs)
    found = fit(weight, inputs[:384], inputs[384:], settings, lambda step, _: steps.append(step))
    assert steps == [*range(25)]
    assert found.rotated_error < 0.8 * found.nearest_error
    assert found.error < 0.8 * found.nearest_error
    assert found.error == output_error(found.weight, weight, inputs[384:], settings)
    assert found.weight.angles.abs().max() > 0.01


def test_same_seed_same_layer() -> None:
    weight, inputs = layer_with_outliers(1)
    one, two = fitted(weight, inputs), fitted(weight, inputs)
    assert one.weight.shares_input_with(two.weight)
    assert torch.equal(one.weight.matrix.codes, two.weight.matrix.codes)


def test_weights_that_four_bits_hold_stay_what_they_are() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-7, 8, (8, 128), generator=generator) * 0.25
    weight[:, 0], weight[:, 1] = -1.75, 2.0
    inputs = torch.randn(128, 128, generator=generator)
    found = fitted(weight, inputs, FitSettings(steps=2, int8_inputs=False))
    assert found.error <= found.nearest_error < 1e-5


def test_inputs_and_shapes_that_cannot_be_used() -> None:
    weight, inputs = layer_with_outliers(3)
    with pytest.raises(InputError, match="finite inputs"):
        fitted(weight, inputs * torch.inf)
    with pytest.raises(InputError, match="found 32 x 100"):
        fitted(weight[:, :100], inputs[:, :100])
    with pytest.raises(InputError, match="positive steps"):
        FitSettings(steps=0)
