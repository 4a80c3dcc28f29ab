"""Matrix products of few rows in Triton: every program streams some rows of the weight through the matrix units.

The weight is the tall operand, so that its rows fill a tile however few rows x has. Where the weight has too few rows
to occupy the device, K is split as well, and whoever reads the parts adds them up in their order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.backend import multiprocessors
from flashdrive_node.engine.kernels.early_launch import follow, options, wait_for_writes
from flashdrive_node.engine.kernels.parts import is_parts


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
    # Three stages let two programs share a processor, which pays where all programs find room at once then.
    deep = 3 if processors < tiles <= 2 * processors else 4
    return Tiling(64, block=128, splits=splits, warps=4, stages=6 if count <= 16 else deep)


def skinny_linear(x: Tensor, weight: Tensor, chosen: Tiling | None = None) -> Tensor:
    """See `linear.skinny_linear`; `chosen` replaces the tiling, for measurements."""
    product = skinny_parts(x, weight, chosen)
    if not is_parts(product):
        return product
    return sum_parts(product, x.dtype)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up float32 [splits, M, N] in the order of the splits: [M, N] of a type."""
    splits, count, out_size = parts.shape
    out = torch.empty(count, out_size, dtype=dtype, device=parts.device)
    grid = (count, triton.cdiv(out_size, 1024))
    _sum[grid](parts, out, count * out_size, out_size, SPLITS=splits, BLOCK=1024, num_warps=4, **options(parts.device))
    return out


def skinny_parts(x: Tensor, weight: Tensor, chosen: Tiling | None = None) -> Tensor:
    """See `linear.skinny_parts`."""
    t = chosen or tiling(len(x), x.shape[1], len(weight), multiprocessors(x.device))
    if t.splits == 1:
        out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(t.splits, len(x), len(weight), dtype=torch.float32, device=x.device)
    _launch(x, weight, out, t, gated=False)
    return out


def gated_linear(x: Tensor, weight: Tensor, chosen: Tiling | None = None) -> Tensor:
    """See `linear.gated_linear`. K is never split: the gate needs whole sums."""
    t = chosen or tiling(len(x), x.shape[1], len(weight), multiprocessors(x.device))
    out = torch.empty(len(x), len(weight) // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, out, replace(t, splits=1), gated=True)
    return out


def _launch(x: Tensor, weight: Tensor, out: Tensor, t: Tiling, gated: bool) -> None:
    (count, size), out_size = x.shape, out.shape[-1]
    rows = t.rows // 2 if gated else t.rows  # of the output per tile
    _linear[(triton.cdiv(out_size, rows), t.splits)](
        x,
        weight,
        out,
        count,
        size,
        out_size,
        COUNT=max(16, triton.next_power_of_2(count)),
        ROWS=t.rows,
        BLOCK=t.block,
        SPLITS=t.splits,
        STAGES=t.stages,
        GATED=gated,
        num_warps=t.warps,
        **options(x.device),
    )


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
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.arange(0, COUNT)
    column_lane = tl.arange(0, BLOCK)
    share = tl.cdiv(tl.cdiv(size, BLOCK), SPLITS) * BLOCK
    begin = split * share
    acc = tl.zeros([ROWS, COUNT], tl.float32)
    # Rows behind the end repeat the last one instead of being masked: their sums are not stored.
    if GATED:  # rows of the gate and of up by turns, so that a program has both of what it stores
        row = tl.minimum(tile * (ROWS // 2) + lane // 2, out_size - 1) + lane % 2 * out_size
    else:
        row = tl.minimum(tile * ROWS + lane, out_size - 1)
    wait_for_writes(EARLY)
    w_row = weight + row[:, None] * size
    for at in tl.range(begin, tl.minimum(begin + share, size), BLOCK, num_stages=STAGES):
        column = at + column_lane
        within = column < size
        w = tl.load(w_row + column[None, :], mask=within[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(
            x_ptr + token[None, :] * size + column[:, None], mask=within[:, None] & (token < count)[None, :], other=0.0
        )
        acc = tl.dot(w, x, acc)
    if GATED:
        pairs = tl.permute(tl.reshape(acc, [ROWS // 2, 2, COUNT]), (0, 2, 1))
        gate, up = tl.split(pairs.to(out.dtype.element_ty).to(tl.float32))
        gated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
        stored = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)
        result = gated * up
    else:
        stored = tile * ROWS + lane
        result = acc
    place = (split * count + token)[None, :] * out_size + stored[:, None]
    known = (stored < out_size)[:, None] & (token < count)[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=known)


@triton.jit
def _sum(parts, out, total, out_size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    follow(EARLY)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < out_size
    place = tl.program_id(0) * out_size + column
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts + split * total + place, mask=within, other=0.0)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=within)
