"""Attention of a few queries to many slots in Triton: the slots are split among programs, then the parts are joined.

The query heads that share a key/value head are rows of one tile, so keys and values are read once per tile and the
products run on matrix units. A tile walks over blocks of slots that some of its rows see: first blocks below every
row's limit, without a mask; then the rest of the limits and the spans, with one. Which blocks these are is computed
on the device from limits and spans.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.backend import multiprocessors
from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.row_formats import LARGEST, QuantisedRows, RowFormat
from flashdrive_node.engine.kernels.triton_round_rows import round_rows, row_scale, within
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
    return Tiling(rows, block, splits, warps=8 if rows == 128 else 4, stages=3)


def attend_visible(q: Tensor, keys: Tensor, values: Tensor, visible: Visible, chosen: Tiling | None = None) -> Tensor:
    """See `attention.attend_visible`; `chosen` replaces the tiling, for measurements."""
    found = _attended(q, keys, values, visible, chosen)
    if not isinstance(found, _Parts):
        return found
    tokens, heads, dim = q.shape
    out = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device)
    splits = len(found.sums)
    _join[(tokens * heads,)](
        found.parts,
        found.sums,
        out,
        tokens * heads,
        DIM=dim,
        SPLITS=splits,
        PADDED=triton.next_power_of_2(splits),
        num_warps=triton.next_power_of_2(triton.cdiv(splits, 16)),
        **options(q.device),
    )
    return out


def attend_round(q: Tensor, keys: Tensor, values: Tensor, visible: Visible, form: RowFormat) -> QuantisedRows:
    """`attend_visible` in a form without groups: what joins the parts rounds them, if there are any."""
    found = _attended(q, keys, values, visible)
    if not isinstance(found, _Parts):
        return round_rows(found, form)
    tokens, heads, dim = q.shape
    rounded = torch.empty(tokens, heads * dim, dtype=form.dtype, device=q.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=q.device)
    padded = triton.next_power_of_2(heads)
    _join_round[(tokens,)](
        found.parts,
        found.sums,
        q,
        rounded,
        scales,
        tokens * heads,
        form.scale or 0.0,
        HEADS=heads,
        PADDED=padded,
        DIM=dim,
        SPLITS=len(found.sums),
        LARGEST=LARGEST[form.dtype],
        FIXED=form.scale is not None,
        num_warps=min(16, max(1, padded * dim // 256)),
        **options(q.device),
    )
    return QuantisedRows(rounded, scales, None, q.dtype)


class _Parts(NamedTuple):
    """What programs that share the slots found: float32 means, and log2 of their sums of exponentials."""

    #: [splits, tokens * heads, head_dim].
    parts: Tensor
    #: [splits, tokens * heads].
    sums: Tensor


def _attended(
    q: Tensor, keys: Tensor, values: Tensor, visible: Visible, chosen: Tiling | None = None
) -> Tensor | _Parts:
    tokens, heads, dim = q.shape
    kv_heads, slots, _ = keys.shape
    group = heads // kv_heads
    t = chosen or tiling(tokens, group, kv_heads, slots, multiprocessors(q.device))
    if t.splits == 1:
        out = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device)
        found = _Parts(out, out)  # unused
    else:
        out = q  # unused
        found = _Parts(
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


@triton.jit
def _join(parts, sums, out, rows, DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr):
    """Mean of one row's parts, weighted by their sums of exponentials."""
    follow(EARLY)
    row = tl.program_id(0)
    split, column = tl.arange(0, PADDED), tl.arange(0, DIM)
    sum_ = tl.load(sums + split * rows + row, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(sum_, 0)
    weight = tl.exp2(sum_ - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total > 0, total, 1.0)
    place = (split[:, None] * rows + row) * DIM + column[None, :]
    part = tl.load(parts + place, mask=(split < SPLITS)[:, None], other=0.0)
    tl.store(out + row * DIM + column, tl.sum(part * weight[:, None], 0).to(out.dtype.element_ty))


@triton.jit
def _join_round(
    parts,
    sums,
    like,
    rounded,
    scales,
    rows,
    fixed,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    LARGEST: tl.constexpr,
    FIXED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """All heads of a token as in `_join`, rounded to the type of `like` and then to 8-bit floats."""
    follow(EARLY)
    token = tl.program_id(0)
    head, column = tl.arange(0, PADDED), tl.arange(0, DIM)
    row, known = token * HEADS + head, head < HEADS
    top = tl.full([PADDED], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(sums + split * rows + row, mask=known, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([PADDED], tl.float32)
    acc = tl.zeros([PADDED, DIM], tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.exp2(tl.load(sums + split * rows + row, mask=known, other=float("-inf")) - base)
        place = (split * rows + row)[:, None] * DIM + column[None, :]
        total += weight
        acc += weight[:, None] * tl.load(parts + place, mask=known[:, None], other=0.0)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    y = acc.to(like.dtype.element_ty).to(tl.float32)
    scale = row_scale(tl.max(tl.abs(y), 1), tl.sum(y * 0.0, 1), fixed, LARGEST, FIXED)
    tl.store(scales + token, scale)
    place = rounded + row[:, None] * DIM + column[None, :]
    tl.store(place, within(y, scale, LARGEST).to(rounded.dtype.element_ty), mask=known[:, None])
