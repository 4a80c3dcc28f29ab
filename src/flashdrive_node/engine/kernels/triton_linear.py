"""Matrix products of few rows in Triton: every program streams some rows of the weight through the matrix units.

The weight is the tall operand, so that its rows fill a tile however few rows x has. Where the weight has too few rows
to occupy the device, K is split as well, and a second launch adds up the parts in their order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.backend import multiprocessors


@dataclass(frozen=True)
class Tiling:
    """Shape of one launch."""

    #: Rows of the weight per tile, and columns per step.
    rows: int
    block: int
    #: Programs that share the columns of a tile.
    splits: int
    warps: int
    stages: int


def tiling(count: int, size: int, out_size: int, processors: int) -> Tiling:
    """A tiling for `count` rows of x of length `size`, found by measuring on an H200."""
    tiles = triton.cdiv(out_size, 64)
    splits = min(4, max(1, processors // tiles), triton.cdiv(size, 512))
    return Tiling(64, block=128, splits=splits, warps=4, stages=6 if count <= 16 else 4)


def skinny_linear(x: Tensor, weight: Tensor, chosen: Tiling | None = None) -> Tensor:
    """See `linear.skinny_linear`; `chosen` replaces the tiling, for measurements."""
    (count, size), out_size = x.shape, len(weight)
    t = chosen or tiling(count, size, out_size, multiprocessors(x.device))
    out = torch.empty(count, out_size, dtype=x.dtype, device=x.device)
    parts = out if t.splits == 1 else torch.empty(t.splits, count, out_size, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(out_size, t.rows)
    _linear[(tiles, t.splits)](
        x,
        weight,
        parts,
        count,
        size,
        out_size,
        COUNT=max(16, triton.next_power_of_2(count)),
        ROWS=t.rows,
        BLOCK=t.block,
        SPLITS=t.splits,
        STAGES=t.stages,
        num_warps=t.warps,
    )
    if t.splits > 1:
        sum_parts(parts, out)
    return out


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Add up float32 [splits, count, out_size] in the order of the splits, into [count, out_size] of any type."""
    splits, count, out_size = parts.shape
    grid = (count, triton.cdiv(out_size, 1024))
    _sum[grid](parts, out, count * out_size, out_size, SPLITS=splits, BLOCK=1024, num_warps=4)


@triton.jit(do_not_specialize=["count"])
def _linear(
    x_ptr,
    weight,
    out,
    count,
    size,
    out_size,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.arange(0, COUNT)
    lane = tl.arange(0, BLOCK)
    share = tl.cdiv(tl.cdiv(size, BLOCK), SPLITS) * BLOCK
    begin = split * share
    acc = tl.zeros([ROWS, COUNT], tl.float32)
    # Rows behind the end repeat the last one instead of being masked: their sums are not stored.
    w_row = weight + tl.minimum(row, out_size - 1)[:, None] * size
    for at in tl.range(begin, tl.minimum(begin + share, size), BLOCK, num_stages=STAGES):
        column = at + lane
        within = column < size
        w = tl.load(w_row + column[None, :], mask=within[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(
            x_ptr + token[None, :] * size + column[:, None], mask=within[:, None] & (token < count)[None, :], other=0.0
        )
        acc = tl.dot(w, x, acc)
    place = (split * count + token)[None, :] * out_size + row[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(row < out_size)[:, None] & (token < count)[None, :])


@triton.jit
def _sum(parts, out, total, out_size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < out_size
    place = tl.program_id(0) * out_size + column
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts + split * total + place, mask=within, other=0.0)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=within)
