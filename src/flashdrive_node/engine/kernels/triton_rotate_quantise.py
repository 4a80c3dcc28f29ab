"""Rows for 4-bit weights in Triton: a matrix per group rotates the channels, and a program per row rounds them.

Pairs are turned in rounds, but a round costs four shuffles per channel within a warp, one after the other: on an H200
18 microseconds for a row of 4096, against 3 for the product with the rounds' matrix. Sums within groups come along for
the zero points of the weights.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.row_formats import LARGEST, QuantisedRows, Rotation, RowFormat
from flashdrive_node.engine.kernels.triton_round_rows import WHOLE, row_scale, within


def turn(x: Tensor, rotation: Rotation, gated: bool = False) -> Tensor:
    """Scaled and turned rows by matrices, float32 [M, K], off by about 2^-17 of a group's norm.

    Args:
        x: Rows [M, K], or in front of the gate [M, 2 * K].
        rotation: Of K channels.
        gated: The latter.
    """
    count, size, width = len(x), x.shape[1] // 2 if gated else x.shape[1], rotation.group_size
    block = 16 if count <= 16 else 64
    out = torch.empty(count, size, dtype=torch.float32, device=x.device)
    _turn[(size // width, triton.cdiv(count, block))](
        x,
        rotation.blocks,
        out,
        count,
        size,
        x.stride(0),
        GATED=gated,
        TOKENS=block,
        WIDTH=width,
        num_warps=4,
        **options(x.device),
    )
    return out


def round_groups(x: Tensor, form: RowFormat, dtype: torch.dtype) -> QuantisedRows:
    """Rows [M, K], turned where the form wants it, into a product's format, for results of a type."""
    count, size = x.shape
    assert form.group_size is not None
    width, groups = form.group_size, size // form.group_size
    values = torch.empty(count, size, dtype=form.dtype, device=x.device)
    floats = torch.empty((groups + 1) * count, dtype=torch.float32, device=x.device)
    scales, sums = floats[:count], floats[count:].view(groups, count)
    padded = triton.next_power_of_2(groups)
    _round_groups[(count,)](
        x,
        values,
        scales,
        sums,
        count,
        size,
        x.stride(0),
        form.scale or 0.0,
        LARGEST=LARGEST.get(form.dtype, 0.0),
        FIXED=form.scale is not None,
        GROUPS=padded,
        WIDTH=width,
        num_warps=min(16, max(1, padded * width // 512)),
        **options(x.device),
    )
    return QuantisedRows(values, scales if form.dtype in LARGEST else None, sums, dtype)


@triton.jit(do_not_specialize=["count"])
def _round_groups(
    x,
    values,
    scales,
    sums,
    count,
    size,
    x_row,
    fixed,
    LARGEST: tl.constexpr,
    FIXED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    y = tl.load(x + row * x_row + place, mask=place < size, other=0.0).to(tl.float32)
    if LARGEST > 0.0:
        scale = row_scale(tl.max(tl.abs(y), 1), tl.sum(y * 0.0, 1), fixed, LARGEST, FIXED)
        tl.store(scales + row, scale)
        y = within(y, scale, LARGEST)
        if values.dtype.element_ty == tl.int8:
            y = (y + WHOLE) - WHOLE
    rounded = y.to(values.dtype.element_ty)
    tl.store(values + row * size + place, rounded, mask=place < size)
    group = tl.arange(0, GROUPS)
    tl.store(sums + group * count + row, tl.sum(rounded.to(tl.float32), 1), mask=group * WIDTH < size)


@triton.jit(do_not_specialize=["count"])
def _turn(
    x,
    blocks,
    out,
    count,
    size,
    x_row,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One group of some rows times the group's matrix, which comes as a sum of two."""
    follow(EARLY)
    group = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, WIDTH)
    column = (group * WIDTH + lane)[None, :]
    row = x + tl.minimum(token, count - 1).to(tl.int64)[:, None] * x_row
    rows = tl.load(row + column)
    if GATED:  # rounded behind either factor, as in `silu_mul`
        gate, up = rows.to(tl.float32), tl.load(row + size + column).to(tl.float32)
        rows = ((gate * tl.sigmoid(gate)).to(rows.dtype).to(tl.float32) * up).to(rows.dtype)
    place = blocks + (group * WIDTH + lane)[:, None] * WIDTH + lane[None, :]
    acc = tl.dot(rows, tl.load(place).to(rows.dtype))
    acc = tl.dot(rows, tl.load(place + size * WIDTH).to(rows.dtype), acc)
    tl.store(out + token.to(tl.int64)[:, None] * size + column, acc, mask=(token < count)[:, None])
