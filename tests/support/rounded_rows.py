"""Rows of 8-bit values beside what they were made of, and the interpreter that rounds them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from flashdrive_node.engine.kernels.rotate_quantise import (
    quantise_reference,
)
from flashdrive_node.engine.kernels.row_formats import QuantisedRows, Rotation, RowFormat
from flashdrive_node.model.fp8 import E4M3
from flashdrive_node.model.paroquant import ALWAYS, ParoLinear
from support.kernel_inputs import DEVICE, assert_close
from support.quantised import random_weight

tl = pytest.importorskip("triton.language", reason="the kernels need the triton package")
interpreter = pytest.importorskip("triton.runtime.interpreter")


def torch_rounds() -> Iterator[None]:
    """The interpreter does not carry from the mantissa to the exponent when it rounds to e4m3 (triton 3.7)."""
    convert = interpreter._convert_float

    def corrected(numbers, source, target, rounding):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(numbers, source, target, rounding)
        return torch.from_numpy(numbers.view(np.float32)).to(E4M3).view(torch.uint8).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", corrected)
        yield


def paro(out_size: int, groups: int, seed: int, int8_from: int = ALWAYS, group_size: int = 128) -> ParoLinear:
    """A layer of random integers."""
    return ParoLinear(random_weight(out_size, groups, seed, group_size), int8_from).to(DEVICE)


def rotation(layer: ParoLinear) -> Rotation:
    """What the layer's inputs go through."""
    return Rotation(layer.channel_scales, layer.steps, layer.turns, layer.blocks, layer.packed.group_size)


def int8_form(layer: ParoLinear) -> RowFormat:
    """What its product takes with 8-bit activations."""
    return RowFormat(torch.int8, rotation(layer), layer.packed.group_size)


def assert_rows(found: QuantisedRows, expected: QuantisedRows) -> None:
    """The same but for values half way between two, which fall to one side or the other."""
    assert found.values.dtype == expected.values.dtype
    if expected.scales is None:
        assert found.scales is None
        assert_close(found.values, expected.values, ulps=1.01)
    else:
        assert found.scales is not None
        torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0)
        assert_steps(found.values, expected.values)
    if expected.sums is None:
        assert found.sums is None
    else:
        # Of the values as they were found.
        groups = found.values.float().unflatten(1, (len(expected.sums), -1))
        torch.testing.assert_close(found.sums, groups.sum(dim=2).T, rtol=1e-5, atol=1e-3)


def assert_rounded(found: QuantisedRows, given_: Tensor, scale: float | None = None) -> None:
    """Rows of 8-bit floats are the nearest to what is given, which may be off by some steps of its 16-bit type."""
    assert found.scales is not None
    slack = 4 * torch.finfo(given_.dtype).eps
    expected = quantise_reference(given_, RowFormat(E4M3, scale=scale)).scales
    torch.testing.assert_close(found.scales, expected, rtol=slack, atol=0)
    scales = found.scales[:, None].double()
    near = given_.double().clamp(-448 * scales, 448 * scales)
    apart = (found.values.double() * scales - near).abs()
    # Half a step is a sixteenth of a value, and below the normal numbers 2^-10.
    assert bool((apart <= near.abs() * (2**-4 + slack) + scales * 2**-10 * (1 + slack)).all())


def assert_steps(found: Tensor, expected: Tensor) -> None:
    """8-bit values, of which few are a neighbour of the one expected."""
    if found.dtype == torch.int8:
        apart = (found.int() - expected.int()).abs()
    else:
        # In the order of the numbers.
        bits = [t.view(torch.int8).int() for t in (found, expected)]
        keys = [torch.where(b < 0, -(b & 127), b) for b in bits]
        apart = (keys[0] - keys[1]).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) <= 0.01 + 2 / apart.numel()
