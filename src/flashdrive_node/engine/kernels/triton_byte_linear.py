"""Products of few rows with 8-bit weights in Triton: int8 with 16-bit floats, e4m3 with e4m3; see `triton_linear`."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.backend import multiprocessors
from flashdrive_node.engine.kernels.early_launch import (
    ahead_bytes,
    fetch_ahead,
    let_next_launch,
    options,
    wait_for_writes,
)
from flashdrive_node.engine.kernels.triton_linear import Tiling


def tiling(count: int, size: int, out_size: int, processors: int) -> Tiling:
    """A tiling for `count` rows of x of length `size`. Not yet measured."""
    tiles = triton.cdiv(out_size, 64)
    splits = min(4, max(1, processors // tiles), triton.cdiv(size, 512))
    return Tiling(64, block=128, splits=splits, warps=4, stages=6 if count <= 16 else 4)


def byte_parts(
    x: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    token_scales: Tensor | None,
    dtype: torch.dtype,
    chosen: Tiling | None = None,
) -> Tensor:
    """Product with a weight of a byte per element; `chosen` replaces the tiling, for measurements.

    Args:
        x: Rows [M, K], M up to 64: e4m3 for an e4m3 weight, a 16-bit float for one of int8.
        weight: [N, K].
        row_scales: Of the weight's rows, float32 [N].
        token_scales: Of x's rows, float32 [M]; None for rows without.
        dtype: Of the result.
        chosen: See above.

    Returns:
        [M, N], or float32 parts of it (see `parts`).
    """
    (count, size), out_size = x.shape, len(weight)
    t = chosen or tiling(count, size, out_size, multiprocessors(x.device))
    shape = (count, out_size) if t.splits == 1 else (t.splits, count, out_size)
    out = torch.empty(shape, dtype=dtype if t.splits == 1 else torch.float32, device=x.device)
    _byte_linear[(triton.cdiv(out_size, t.rows), t.splits)](
        x,
        weight,
        row_scales,
        row_scales if token_scales is None else token_scales,
        out,
        count,
        size,
        out_size,
        SCALED=token_scales is not None,
        COUNT=max(16, triton.next_power_of_2(count)),
        ROWS=t.rows,
        BLOCK=t.block,
        SPLITS=t.splits,
        STAGES=t.stages,
        AHEAD=ahead_bytes(weight),
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
    SCALED: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    let_next_launch(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.arange(0, COUNT)
    lane = tl.arange(0, BLOCK)
    share = tl.cdiv(tl.cdiv(size, BLOCK), SPLITS) * BLOCK
    begin = split * share
    # What lies behind the end repeats the last row or token instead of being masked: its sums are not stored.
    known_row = tl.minimum(row, out_size - 1).to(tl.int64)
    known_token = tl.minimum(token, count - 1)
    if begin < size:
        fetch_ahead(weight + known_row * size + begin, tl.minimum(share, size - begin), EARLY, AHEAD)
    wait_for_writes(EARLY)
    acc = tl.zeros([ROWS, COUNT], tl.float32)
    for at in tl.range(begin, tl.minimum(begin + share, size), BLOCK, num_stages=STAGES):
        column = at + lane
        within = column < size
        w = tl.load(weight + known_row[:, None] * size + column[None, :], mask=within[None, :], other=0.0)
        x = tl.load(x_ptr + known_token[None, :] * size + column[:, None], mask=within[:, None], other=0.0)
        if w.dtype == tl.int8:
            w = w.to(x.dtype)
        acc = tl.dot(w, x, acc)
    acc *= tl.load(row_scales + known_row)[:, None]
    if SCALED:
        acc *= tl.load(token_scales + known_token)[None, :]
    place = (split * count + token).to(tl.int64)[None, :] * out_size + row[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(row < out_size)[:, None] & (token < count)[None, :])
