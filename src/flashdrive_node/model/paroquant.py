"""ParoQuant (arXiv 2511.10645): 4-bit weights of channels that were scaled and rotated in pairs.

Before a linear layer the input is multiplied by a scale per channel and rotated (`givens`); the weight was divided by
the scales, rotated in the same way, and rounded (`int4`), so the product is the original one but for the rounding. With
8-bit activations each rotated token is rounded to int8 by its largest value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.givens import pair_index, rotate_pairs, rotate_pairs_back
from flashdrive_node.model.int4 import Int4Weight, dequantise, unpack_bytes
from flashdrive_node.model.linear import QuantisedLinear

#: Rows of inputs from which activations are rounded to 8 bits: in every product, or in none.
ALWAYS, NEVER = 0, 2**62
#: Scales that overflowed float16 when they were stored count as this large, as in the published loader.
MAX_CHANNEL_SCALE = 512.0
_INT8_MAX = 127.0


class ParoWeight(NamedTuple):
    """One linear layer [N, K], independent of the layout of its file."""

    #: int16 [rounds, K], see `givens.pair_index`.
    pairs: Tensor
    #: Radians, float16 [rounds, K / 2].
    angles: Tensor
    #: What inputs are multiplied by, float16 [K].
    channel_scales: Tensor
    #: Of the scaled and rotated weight.
    matrix: Int4Weight

    def shares_input_with(self, other: ParoWeight) -> bool:
        """Whether both take the same scaled and rotated input."""
        return all(torch.equal(a, b) for a, b in zip(self[:3], other[:3], strict=True))


class ParoLinear(QuantisedLinear):
    """A linear layer of 4-bit weights; sums are taken in float32."""

    index: Tensor
    angles: Tensor
    channel_scales: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: ParoWeight, int8_from: int = ALWAYS):
        """Take the tensors over.

        Args:
            weight: The layer.
            int8_from: Rows of inputs from which they are rounded to int8: `ALWAYS` (W4A8), `NEVER` (W4A16), or a
                number that separates prefill from decoding.

        Raises:
            InputError: Shapes that do not belong together, pairs that are none, or scales and angles of no value.
        """
        rows, columns = weight.matrix.shape
        super().__init__(columns, rows)
        self.int8_from = int8_from
        _require_fit(weight)
        self.register_buffer("index", pair_index(weight.pairs, weight.matrix.group_size).to(torch.int32))
        self.register_buffer("angles", weight.angles)
        self.register_buffer("channel_scales", finite_scales(weight.channel_scales))
        for name, tensor in zip(Int4Weight._fields, weight.matrix, strict=True):
            self.register_buffer(name, tensor)

    @property
    def format(self) -> str:  # type: ignore[override]
        """Of the activations, which is a matter of this layer's use."""
        return {ALWAYS: "w4a8", NEVER: "w4a16"}.get(self.int8_from, f"w4a8 from {self.int8_from} rows, else w4a16")

    @property
    def matrix(self) -> Int4Weight:
        """The rotated weight."""
        return Int4Weight(self.codes, self.scales, self.zeros)

    def rotated(self, x: Tensor) -> Tensor:
        """Scaled and rotated inputs, float32."""
        return rotate_pairs(x.float() * self.channel_scales.float(), self.index, self.angles.float())

    def forward(self, x: Tensor) -> Tensor:
        """See `QuantisedLinear.forward`."""
        turned = self.rotated(x)
        if x.numel() // x.shape[-1] < self.int8_from:
            return int4_linear(turned, self.matrix).to(x.dtype)
        q, scale = round_tokens(turned)
        return (int4_linear(q, self.matrix) * scale).to(x.dtype)

    def dequantised(self) -> Tensor:
        """See `QuantisedLinear.dequantised`."""
        weight = rotate_pairs_back(dequantise(self.matrix), self.index, self.angles.float())
        return weight * self.channel_scales.float()


def finite_scales(scales: Tensor) -> Tensor:
    """Channel scales with what overflowed float16 as `MAX_CHANNEL_SCALE` of its sign.

    Such a channel's weight was divided by a number beyond 65504: it lies below the resolution of its group, so that
    the factor matters to nothing but the range of the inputs.
    """
    return torch.where(scales.isinf(), scales.sign() * MAX_CHANNEL_SCALE, scales)


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every row to whole numbers of -127 to 127 and its scale: x [..., K] -> the same and [..., 1], float32."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / _INT8_MAX
    return (x / scale).round(), scale


def int4_linear(x: Tensor, weight: Int4Weight) -> Tensor:
    """Product with a 4-bit weight, group by group, so that one group of it at a time is unpacked.

    With whole numbers of up to 127 in x every group's sum is exact in float32.

    Args:
        x: float32 [..., K].
        weight: [N, K].

    Returns:
        float32 [..., N].
    """
    size, half = weight.group_size, weight.group_size // 2
    out = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for group, part in enumerate(x.split(size, dim=-1)):
        codes = unpack_bytes(weight.codes[:, group * half : (group + 1) * half]).float()
        product = linear(part, codes - weight.zeros[:, group, None].float())
        out += product * weight.scales[:, group].float()
    return out


def _require_fit(weight: ParoWeight) -> None:
    """Shapes of one layer, groups of an even size, and no nan anywhere."""
    matrix = weight.matrix
    rows, columns = matrix.shape
    rounds, groups = weight.pairs.shape[0], matrix.scales.shape[-1]
    required = {
        "pairs": (weight.pairs, (rounds, columns)),
        "angles": (weight.angles, (rounds, columns // 2)),
        "channel scales": (weight.channel_scales, (columns,)),
        "scales": (matrix.scales, (rows, groups)),
        "zero points": (matrix.zeros, (rows, groups)),
    }
    problems = [
        f"{name} of shape {list(shape)} are required for a weight {rows} x {columns}, found {list(tensor.shape)}"
        for name, (tensor, shape) in required.items()
        if tuple(tensor.shape) != shape
    ]
    problems += [
        f"{name} without nan are required" for name, (tensor, _) in required.items() if bool(tensor.isnan().any())
    ]
    if groups == 0 or columns % groups or (columns // groups) % 2:
        problems.append(f"{groups} groups of an even size do not make {columns} columns")
    if not bool(torch.isfinite(weight.angles).all() and torch.isfinite(matrix.scales).all()):
        problems.append("finite angles and scales are required")
    if problems:
        raise InputError("; ".join(problems))
