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
from flashdrive_node.model.givens import (
    pair_index,
    rotate_by_blocks,
    rotate_pairs,
    rotate_pairs_back,
    rotation_blocks,
    rotation_steps,
)
from flashdrive_node.model.int4 import LEVELS, Int4Weight, PackedInt4, dequantise, pack_groups, unpack_groups
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
    #: What kernels rotate by: `givens.rotation_steps`, and cosine and sine of each angle in turn, float32 [rounds, K].
    steps: Tensor
    turns: Tensor
    #: The same as one matrix per group, of the channel scales and the rotation: [groups, channel in, channel out].
    #: bfloat16, and what the first lacks in a second, so [2, groups, group_size, group_size].
    blocks: Tensor
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
        index, angles = pair_index(weight.pairs, weight.matrix.group_size), weight.angles.float()
        self.register_buffer("index", index.to(torch.int32))
        self.register_buffer("angles", weight.angles)
        self.register_buffer("channel_scales", finite_scales(weight.channel_scales))
        self.register_buffer("steps", rotation_steps(index, weight.matrix.group_size))
        self.register_buffer("turns", torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1))
        blocks = rotation_blocks(index, angles, weight.matrix.group_size)
        blocks = blocks * self.channel_scales.float().view(len(blocks), -1, 1)
        near = blocks.bfloat16()
        self.register_buffer("blocks", torch.stack((near, (blocks - near.float()).bfloat16())))
        for name, tensor in zip(PackedInt4._fields, pack_groups(weight.matrix), strict=True):
            self.register_buffer(name, tensor)

    @property
    def format(self) -> str:  # type: ignore[override]
        """Of the activations, which is a matter of this layer's use."""
        return {ALWAYS: "w4a8", NEVER: "w4a16"}.get(self.int8_from, f"w4a8 from {self.int8_from} rows, else w4a16")

    @property
    def packed(self) -> PackedInt4:
        """The rotated weight as it is kept."""
        return PackedInt4(self.codes, self.scales, self.zeros)

    @property
    def matrix(self) -> Int4Weight:
        """The rotated weight row by row."""
        return unpack_groups(self.packed)

    def rotated(self, x: Tensor) -> Tensor:
        """Scaled and rotated inputs, float32."""
        return rotate_pairs(x.float() * self.channel_scales.float(), self.index, self.angles.float())

    def rotated_at_once(self, x: Tensor) -> Tensor:
        """What `rotated` gives, up to rounding, by one product in place of the dozens of kernels of eight rounds."""
        blocks = self.blocks[0].float() + self.blocks[1].float()
        return rotate_by_blocks(x.float().flatten(0, -2), blocks).view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """See `QuantisedLinear.forward`."""
        turned = self.rotated_at_once(x) if x.is_cuda else self.rotated(x)
        if x.numel() // x.shape[-1] < self.int8_from:
            return int4_linear(turned.to(x.dtype).float(), self.packed).to(x.dtype)
        q, scale = round_tokens(turned)
        return (int4_linear(q, self.packed) * scale).to(x.dtype)

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


def int4_linear(x: Tensor, weight: PackedInt4) -> Tensor:
    """Product with a 4-bit weight, group by group, so that one group of it at a time is unpacked.

    With whole numbers of up to 127 in x every group's sum is exact in float32.

    Args:
        x: float32 [..., K].
        weight: [N, K].

    Returns:
        float32 [..., N].
    """
    out = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for part, packed, scales, zeros in zip(x.split(weight.group_size, dim=-1), *weight, strict=True):
        codes = torch.cat((packed & LEVELS, packed >> 4), dim=1).float()
        out += linear(part, codes - zeros[:, None].float()) * scales.float()
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
