"""Attention of a few queries to many slots in Triton: the slots are split among programs (see `triton_join`).

The query heads that share a key/value head are rows of one tile, so keys and values are read once per tile and the
products run on matrix units. A tile walks over blocks of slots that some of its rows see: first blocks below every
row's limit, without a mask; then the rest of the limits and the spans, with one. Which blocks these are is computed
on the device from limits and spans.
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
from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.row_formats import QuantisedRows, RowFormat
from flashdrive_node.engine.kernels.triton_join import Shares, join, join_round
from flashdrive_node.engine.kernels.triton_round_rows import round_rows
from flashdrive_node.engine.kernels.visibility import Visible

#: Larger than any slot.
_FAR = tl.constexpr(2**30)
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiling:
    """Shape of one launch."""

    #: Rows (queries times heads of a group) and slots per step.
    rows: int
    block: int
    #: Programs that share the slots of a tile.
    splits: int
    warps: int
    stages: int


def tiling(tokens: int, group: int, kv_heads: int, slots: int, processors: int) -> Tiling:
    """A tiling for a shape, found by measuring on an H200."""
    packed = tokens * group
    rows = 16 if packed <= 16 else 32 if packed <= 32 else 128 if 512 <= packed <= 2048 else 64
    tiles = triton.cdiv(packed, rows) * kv_heads
    block = 64
    splits = max(1, min(processors // tiles, triton.cdiv(slots, 2 * block)))
    # Where a program sees few blocks, more of them under way pay.
    return Tiling(rows, block, splits, warps=8 if rows == 128 else 4, stages=4 if rows == 64 and splits > 1 else 3)


def attend_visible(q: Tensor, keys: Tensor, values: Tensor, visible: Visible, chosen: Tiling | None = None) -> Tensor:
    """See `attention.attend_visible`; `chosen` replaces the tiling, for measurements."""
    found = _attended(q, keys, values, visible, chosen)
    return join(found, q) if isinstance(found, Shares) else found


def attend_round(q: Tensor, keys: Tensor, values: Tensor, visible: Visible, form: RowFormat) -> QuantisedRows:
    """`attend_visible` in a form without groups."""
    found = _attended(q, keys, values, visible)
    return join_round(found, q, form) if isinstance(found, Shares) else round_rows(found, form)


def _attended(
    q: Tensor, keys: Tensor, values: Tensor, visible: Visible, chosen: Tiling | None = None
) -> Tensor | Shares:
    tokens, heads, dim = q.shape
    kv_heads, slots, _ = keys.shape
    group = heads // kv_heads
    t = chosen or tiling(tokens, group, kv_heads, slots, multiprocessors(q.device))
    if t.splits == 1:
        out = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device)
        found = Shares(out, out)  # unused
    else:
        out = q  # unused
        found = Shares(
            torch.empty(t.splits, tokens * heads, dim, dtype=torch.float32, device=q.device),
            torch.empty(t.splits, tokens * heads, dtype=torch.float32, device=q.device),
        )
    _attend[(kv_heads, triton.cdiv(tokens * group, t.rows), t.splits)](
        q,
        keys,
        values,
        visible.limits,
        visible.spans,
        out,
        *found,
        tokens,
        slots,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        _LOG2_E * dim**-0.5,
        GROUP=group,
        HEADS=heads,
        DIM=dim,
        SPANS=visible.spans.shape[1],
        ROWS=t.rows,
        BLOCK=t.block,
        SPLITS=t.splits,
        STAGES=t.stages,
        num_warps=t.warps,
        **options(q.device),
    )
    return out if t.splits == 1 else found


@triton.jit
def _min_and_max(low, high, other_low, other_high):
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def _hull(spans, query, valid, index, SPANS: tl.constexpr):
    """First slot and number of slots of what covers one span of every row; empty spans do not count."""
    first = tl.load(spans + (query * SPANS + index) * 2, mask=valid, other=0)
    end = tl.load(spans + (query * SPANS + index) * 2 + 1, mask=valid, other=0)
    some = end > first
    start, behind = tl.reduce((tl.where(some, first, _FAR), tl.where(some, end, 0)), 0, _min_and_max)
    return start, tl.maximum(behind - start, 0)


@triton.jit
def _absorb(q, k, v, seen, acc, top, total, scale, MASKED: tl.constexpr):
    """One block of slots into the running softmax; `top` is the largest product of a query and a key so far."""
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Where a row has seen nothing yet, both are -inf, and their difference would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top) * scale
    weights = tl.exp2(scores * scale - base[:, None])
    fade = tl.exp2(top * scale - base)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None])
    return acc, new_top, total


@triton.jit(do_not_specialize=["tokens"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    limits,
    spans,
    out,
    parts,
    sums,
    tokens,
    slots,
    q_token,
    q_head,
    kv_head,
    kv_slot,
    scale,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One tile of rows of one key/value head, over one part of its blocks."""
    # The last tiles see most where limits ascend: those of all heads start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    head, split = tl.program_id(0), tl.program_id(2)
    lane = tl.arange(0, BLOCK)
    follow(EARLY)
    row = tile * ROWS + tl.arange(0, ROWS)
    query = row // GROUP
    valid = query < tokens
    column = tl.arange(0, DIM)
    q_row = query * q_token + (head * GROUP + row % GROUP) * q_head
    q = tl.load(q_ptr + q_row[:, None] + column[None, :], mask=valid[:, None], other=0.0)
    limit = tl.minimum(tl.load(limits + query, mask=valid, other=0), slots)

    # Blocks of the limits, then of the first span's hull, then of the second's.
    least, most = tl.reduce((tl.where(valid, limit, _FAR), limit), 0, _min_and_max)
    shared = least // BLOCK  # blocks that every row sees whole
    blocks = tl.cdiv(most, BLOCK)
    first_span = blocks
    hull_1, hull_2 = 0, 0
    if SPANS > 0:
        hull_1, size = _hull(spans, query, valid, 0, SPANS)
        blocks += tl.cdiv(size, BLOCK)
    second_span = blocks
    if SPANS > 1:
        hull_2, size = _hull(spans, query, valid, 1, SPANS)
        blocks += tl.cdiv(size, BLOCK)

    k_base = k_ptr + head * kv_head + column[None, :]
    v_base = v_ptr + head * kv_head + column[None, :]
    acc = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for block in tl.range(split, shared, SPLITS, num_stages=STAGES):
        place = (block * BLOCK + lane)[:, None] * kv_slot
        k = tl.load(k_base + place)
        v = tl.load(v_base + place)
        acc, top, total = _absorb(q, k, v, limit, acc, top, total, scale, MASKED=False)
    # Blocks are dealt out in turn, so that those with a mask, which cost more, fall to different programs.
    first_masked = shared + (split + SPLITS - shared % SPLITS) % SPLITS
    for block in tl.range(first_masked, blocks, SPLITS, num_stages=2):
        low, high, start = tl.zeros_like(limit), limit, block * BLOCK
        if SPANS > 0:
            of_span = block >= first_span
            span = tl.where(block >= second_span, SPANS - 1, 0)
            bounds = spans + (query * SPANS + span) * 2
            low = tl.load(bounds, mask=valid & of_span, other=0)
            high = tl.where(of_span, tl.load(bounds + 1, mask=valid & of_span, other=0), limit)
            start = tl.where(of_span, hull_1 + (block - first_span) * BLOCK, start)
        if SPANS > 1:
            start = tl.where(block >= second_span, hull_2 + (block - second_span) * BLOCK, start)
        slot = start + lane
        seen = (slot[None, :] >= low[:, None]) & (slot[None, :] < tl.minimum(high, slots)[:, None])
        used = tl.max(seen.to(tl.int32), 0) > 0  # what nobody sees is not read: it may be NaN
        place = slot[:, None] * kv_slot
        k = tl.load(k_base + place, mask=used[:, None], other=0.0)
        v = tl.load(v_base + place, mask=used[:, None], other=0.0)
        acc, top, total = _absorb(q, k, v, seen, acc, top, total, scale, MASKED=True)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_row = query * HEADS + head * GROUP + row % GROUP
    place = out_row[:, None] * DIM + column[None, :]
    if SPLITS == 1:
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=valid[:, None])
    else:
        tl.store(parts + split * tokens * HEADS * DIM + place, acc, mask=valid[:, None])
        # log2 of the sum of exponentials; of nothing it is -inf.
        tl.store(
            sums + split * tokens * HEADS + out_row, top * scale + tl.log2(tl.where(total > 0, total, 1.0)), mask=valid
        )
