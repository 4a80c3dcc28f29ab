"""Rows of inputs as products with quantised weights take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Types whose values are scaled, and up to which value.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True, eq=False)
class Rotation:
    """How channels are scaled and turned in groups before they are rounded (see `ParoLinear`)."""

    #: What inputs are multiplied by, [K] of a floating type.
    channel_scales: Tensor
    #: uint8 [rounds + 1, K], of `givens.rotation_steps`.
    steps: Tensor
    #: Cosine and sine of each pair in turn, float32 [rounds, K].
    turns: Tensor
    #: All of it as matrices, [2, groups, group_size, group_size], of which the second holds what the first lacks.
    blocks: Tensor
    #: Channels of a group.
    group_size: int


class RowFormat(NamedTuple):
    """What a layer's product takes."""

    #: int8, torch.float8_e4m3fn, or a 16-bit float: the type of the values.
    dtype: torch.dtype
    rotation: Rotation | None = None
    #: Channels of which sums are wanted; those of the rotation where there is one.
    group_size: int | None = None
    #: Of all rows, by which they are rounded and cut off; None takes each row's own.
    scale: float | None = None


@dataclass(frozen=True, eq=False)
class QuantisedRows:
    """M rows in a `RowFormat`: ``values * scales``. A row that held inf or nan has a scale of nan."""

    #: [M, K].
    values: Tensor
    #: float32 [M]; None where values are 16-bit floats, which need none.
    scales: Tensor | None
    #: Sum of a row's values in every group, float32 [groups, M]; None where none are wanted.
    sums: Tensor | None
    #: Of what the rows were made of, and of products with them.
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Unscaled:
    """A product with 8-bit floats on both sides, in front of the scales of either: ``sums * scales * scales``."""

    #: bfloat16 [M, N], whose range is that of float32.
    sums: Tensor
    #: Of M rows and of the weight's N rows, float32.
    token_scales: Tensor
    row_scales: Tensor
