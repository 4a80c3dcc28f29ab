"""Asymmetric 4-bit weights: integers 0 to 15 with a scale and a zero point for every group of input channels.

A weight is ``scale * (code - zero)``. Two codes share a byte, the even channel in its low half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.model.errors import InputError

#: Largest code.
LEVELS = 15
#: Range of a group below which it counts as constant.
_MIN_RANGE = 1e-5


class Int4Weight(NamedTuple):
    """A matrix [N, K] in groups along K."""

    #: uint8 [N, K / 2].
    codes: Tensor
    #: float16 [N, groups].
    scales: Tensor
    #: uint8 [N, groups], 0 to 15.
    zeros: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return self.shape[1] // self.scales.shape[1]


class PackedInt4(NamedTuple):
    """The same matrix in the order in which a product reads it: all rows of one group, then those of the next.

    What any number of rows need of a group is one stretch of memory, and both halves of its bytes go with neighbouring
    inputs: byte j of a row holds channel j of the group in its low half, and channel ``j + group_size / 2`` in the high
    one.
    """

    #: uint8 [groups, N, group_size / 2].
    codes: Tensor
    #: float16 [groups, N].
    scales: Tensor
    #: uint8 [groups, N], 0 to 15.
    zeros: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        groups, rows, half = self.codes.shape
        return rows, groups * 2 * half

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return 2 * self.codes.shape[2]


def group_range(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points that span every group: float32 [N, groups] each, zero points whole numbers 0 to 15.

    Raises:
        InputError: Groups that do not divide the columns, or values that are not finite.
    """
    if weight.ndim != 2 or group_size < 2 or weight.shape[1] % group_size:
        raise InputError(f"a matrix in whole groups of {group_size} columns is required, found {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise InputError("finite weights are required, found inf or nan")
    groups = weight.detach().float().unflatten(1, (-1, group_size))
    # Zero points are codes, so zero must lie within the range.
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    # As the file has it: what is quantised must be quantised by the scale that it will be read with.
    scales = ((high - low).clamp(min=_MIN_RANGE) / LEVELS).half().float()
    return scales, (-(low / scales).round()).clamp(0, LEVELS)


def quantise(weight: Tensor, group_size: int) -> Int4Weight:
    """Round every weight to the nearest of its group's 16 values. Arguments and errors as in `group_range`."""
    scales, zeros = group_range(weight, group_size)
    return quantise_with(weight, scales, zeros)


def quantise_with(weight: Tensor, scales: Tensor, zeros: Tensor) -> Int4Weight:
    """Round to the nearest code of given scales and whole zero points, [N, groups] each."""
    groups = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    return Int4Weight(
        pack_bytes(codes.clamp(0, LEVELS).to(torch.uint8).flatten(1)), scales.half(), zeros.to(torch.uint8)
    )


def dequantise(weight: Int4Weight) -> Tensor:
    """The matrix, float32 [N, K]."""
    codes = unpack_bytes(weight.codes).unflatten(1, (weight.scales.shape[1], -1)).float()
    return ((codes - weight.zeros[..., None].float()) * weight.scales[..., None].float()).flatten(1)


def pack_bytes(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K], 0 to 15, to uint8 [N, K / 2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_bytes(packed: Tensor) -> Tensor:
    """The inverse of `pack_bytes`."""
    return torch.stack((packed & LEVELS, packed >> 4), dim=-1).flatten(1)


def pack_groups(weight: Int4Weight) -> PackedInt4:
    """To the order of a product."""
    low, high = unpack_bytes(weight.codes).unflatten(1, (weight.scales.shape[1], 2, -1)).unbind(2)
    codes = (low | (high << 4)).transpose(0, 1).contiguous()
    return PackedInt4(codes, weight.scales.T.contiguous(), weight.zeros.T.contiguous())


def unpack_groups(packed: PackedInt4) -> Int4Weight:
    """The inverse of `pack_groups`."""
    codes = torch.cat((packed.codes & LEVELS, packed.codes >> 4), dim=2).transpose(0, 1).flatten(1)
    return Int4Weight(pack_bytes(codes), packed.scales.T.contiguous(), packed.zeros.T.contiguous())
