"""The rounding of a layer's weight to 8-bit floats that loses least on inputs that the layer met.

Rounded to the nearest, a weight is off by up to 1/16, and always in the same direction: errors that all tokens and all
steps of a flow share, where those of rounded inputs average out. Here columns make up for each other (`compensation`).

The result is a matrix of values that bfloat16 and e4m3 with a scale per row both hold exactly. So it is written as any
weight is, whoever reads it may compute in bfloat16, and whoever rounds its rows by their largest value (`Fp8Linear`,
and everybody else's row-wise FP8) finds the very values that were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashdrive_node.model.fp8 import E4M3, round_rows
from flashdrive_node.training.compensation import compensated

_LARGEST = torch.finfo(E4M3).max
#: Of a scale: with the four of e4m3 they make up the eight significant bits of bfloat16.
_SCALE_BITS = 4
#: Root of the mean square of e4m3's rounding, relative to what is rounded.
_INPUT_NOISE = 0.026


@dataclass(frozen=True)
class FloatFit:
    """A weight in 8-bit floats, and how far outputs are from the original's, relative, on inputs of other windows.

    Errors are of the weight alone. Inputs are rounded too, which is as much again or more for a single token.
    """

    #: [N, K] of values that e4m3 with a scale per row holds exactly, and bfloat16 too.
    weight: Tensor
    error: float
    #: Of rounding to the nearest.
    nearest_error: float

    def packed(self) -> tuple[dict[str, Tensor], list[float]]:
        """Tensors by name, and errors."""
        return {"weight": self.weight}, [self.error, self.nearest_error]

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], errors: list[float]) -> FloatFit:
        """What `packed` was called for."""
        return cls(tensors["weight"], *errors)


def fit_float(weight: Tensor, inputs: Tensor, held_out: Tensor) -> FloatFit:
    """Round a layer's weight.

    Args:
        weight: [N, K].
        inputs: What the layer met, [rows, K].
        held_out: The same of other windows, for the errors.

    Returns:
        The better one of this and of rounding to the nearest, by the error on the held-out inputs.

    Raises:
        InputError: Inputs that are not finite, or none.
    """
    weight, inputs, held_out = weight.float(), inputs.float(), held_out.float()
    nearest_error = output_error(_nearest(weight), weight, held_out)
    found = round_by_rows(weight, inputs)
    error = output_error(found, weight, held_out)
    if error < nearest_error:
        return FloatFit(found, error, nearest_error)
    return FloatFit(weight, nearest_error, nearest_error)  # which readers round to the nearest


def round_by_rows(weight: Tensor, inputs: Tensor) -> Tensor:
    """Float32 [N, K] of e4m3 values by a scale per row, see `FloatFit.weight`."""
    size, pivot = weight.abs().max(dim=1)
    scale = _short(size / _LARGEST)
    # The largest value of a row stays the largest, whatever it has to make up for: readers find the scale by it.
    forced = torch.sign(weight.gather(1, pivot[:, None]))[:, 0] * _LARGEST * scale

    def rounded(values: Tensor, column: int) -> Tensor:
        codes = (values / scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp(-_LARGEST, _LARGEST).to(E4M3)
        return torch.where(pivot == column, forced, codes.float() * scale)

    return compensated(weight, inputs, rounded, _INPUT_NOISE)


def output_error(found: Tensor, weight: Tensor, inputs: Tensor) -> float:
    """Norm of the outputs' error relative to the outputs' norm, of a weight in the place of another."""
    exact = linear(inputs, weight)
    return float(linear(inputs, found - weight).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _nearest(weight: Tensor) -> Tensor:
    codes, scales = round_rows(weight)
    return codes.float() * scales


def _short(scale: Tensor) -> Tensor:
    """To so many significant bits."""
    mantissa, exponent = torch.frexp(scale)
    steps = 2**_SCALE_BITS
    return torch.ldexp((mantissa * steps).round() / steps, exponent)
