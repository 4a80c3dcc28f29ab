"""Products of few rows with 8-bit weights in Triton: int8 with int8, e4m3 with e4m3; see `triton_linear`.

Rows for int8 weights come as two terms, which together have 15 bits behind a row's largest value: the matrix units take
the weight as it is then, while to convert it to 16 bits takes longer than to read it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.backend import multiprocessors
from flashdrive_node.engine.kernels.early_launch import options, wait_for_writes
from flashdrive_node.engine.kernels.triton_linear import Tiling
from flashdrive_node.engine.kernels.triton_round_rows import SECOND_TERM


def tiling(count: int, size: int, out_size: int, processors: int) -> Tiling:
    """A tiling for `count` rows of x of length `size`, found by measuring on an H200."""
    tiles = triton.cdiv(out_size, 64)
    if tiles >= 2 * processors:
        return Tiling(128, block=128, splits=1, warps=8, stages=4 if count <= 16 else 3)
    # Three programs find room on a processor at once, of many rows half as many.
    room = 3 * processors // (tiles if count <= 16 else 2 * tiles)
    splits = min(4, 1 << max(0, room.bit_length() - 1), triton.cdiv(size, 512))
    return Tiling(64, block=128, splits=splits, warps=4, stages=4 if count <= 16 and size <= 4096 else 6)


def byte_parts(
    x: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    token_scales: Tensor,
    dtype: torch.dtype,
    chosen: Tiling | None = None,
) -> Tensor:
    """Product with a weight of a byte per element; `chosen` replaces the tiling, for measurements.

    Args:
        x: Rows, M up to 64: e4m3 [M, K] for an e4m3 weight, for one of int8 the two terms of `round_twice`, [2, M, K].
        weight: [N, K].
        row_scales: Of the weight's rows, float32 [N].
        token_scales: Of x's rows, float32 [M].
        dtype: Of the result.
        chosen: See above.

    Returns:
        [M, N], or float32 parts of it (see `parts`).
    """
    (count, size), out_size = x.shape[-2:], len(weight)
    t = chosen or tiling(count, size, out_size, multiprocessors(x.device))
    shape = (count, out_size) if t.splits == 1 else (t.splits, count, out_size)
    out = torch.empty(shape, dtype=dtype if t.splits == 1 else torch.float32, device=x.device)
    _byte_linear[(triton.cdiv(out_size, t.rows), t.splits)](
        x,
        weight,
        row_scales,
        token_scales,
        out,
        count,
        size,
        out_size,
        TERMS=2 if x.ndim == 3 else 1,
        COUNT=max(16, triton.next_power_of_2(count)),
        ROWS=t.rows,
        BLOCK=t.block,
        SPLITS=t.splits,
        STAGES=t.stages,
        num_warps=t.warps,
        **options(x.device),
    )
    return out


@triton.jit(do_not_specialize=["count"])
def _byte_linear(
    x_ptr,
    weight,
    row_scales,
    token_scales,
    out,
    count,
    size,
    out_size,
    TERMS: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.arange(0, COUNT)
    lane = tl.arange(0, BLOCK)
    share = tl.cdiv(tl.cdiv(size, BLOCK), SPLITS) * BLOCK
    begin = split * share
    # What lies behind the end repeats the last row or token instead of being masked: its sums are not stored.
    known_row = tl.minimum(row, out_size - 1).to(tl.int64)
    known_token = tl.minimum(token, count - 1)
    wait_for_writes(EARLY)
    acc = tl.zeros([ROWS, COUNT], tl.int32 if TERMS == 2 else tl.float32)
    rest = acc
    for at in tl.range(begin, tl.minimum(begin + share, size), BLOCK, num_stages=STAGES):
        column = at + lane
        within = column < size
        w = tl.load(weight + known_row[:, None] * size + column[None, :], mask=within[None, :], other=0.0)
        x_place = x_ptr + known_token[None, :] * size + column[:, None]
        acc = tl.dot(w, tl.load(x_place, mask=within[:, None], other=0.0), acc, out_dtype=acc.dtype)
        if TERMS == 2:
            x = tl.load(x_place + count * size, mask=within[:, None], other=0.0)
            rest = tl.dot(w, x, rest, out_dtype=rest.dtype)
    scales = tl.load(row_scales + known_row)[:, None] * tl.load(token_scales + known_token)[None, :]
    if TERMS == 2:
        result = (acc.to(tl.float32) + rest.to(tl.float32) / SECOND_TERM) * scales
    else:
        result = acc * scales
    place = (split * count + token).to(tl.int64)[None, :] * out_size + row[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(row < out_size)[:, None] & (token < count)[None, :])
