"""What programs that share the slots of an attention found, joined in Triton: as it is, or rounded to 8-bit floats."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.row_formats import LARGEST, QuantisedRows, RowFormat
from flashdrive_node.engine.kernels.triton_round_rows import row_scale, within


class Shares(NamedTuple):
    """Means over the slots of each program, and log2 of their sums of exponentials; float32."""

    #: [splits, tokens * heads, head_dim].
    means: Tensor
    #: [splits, tokens * heads].
    sums: Tensor


def join(shares: Shares, q: Tensor) -> Tensor:
    """Of queries [tokens, heads, head_dim]: [tokens, heads * head_dim] in their type."""
    tokens, heads, dim = q.shape
    out, splits = torch.empty(tokens, heads * dim, dtype=q.dtype, device=q.device), len(shares.sums)
    _join[(tokens * heads,)](
        *shares,
        out,
        tokens * heads,
        DIM=dim,
        SPLITS=splits,
        PADDED=triton.next_power_of_2(splits),
        num_warps=triton.next_power_of_2(triton.cdiv(splits, 16)),
        **options(q.device),
    )
    return out


def join_round(shares: Shares, q: Tensor, form: RowFormat) -> QuantisedRows:
    """`join` in a form without groups."""
    tokens, heads, dim = q.shape
    values = torch.empty(tokens, heads * dim, dtype=form.dtype, device=q.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=q.device)
    padded = triton.next_power_of_2(heads)
    _join_round[(tokens,)](
        *shares,
        q,
        values,
        scales,
        tokens * heads,
        form.scale or 0.0,
        HEADS=heads,
        PADDED=padded,
        DIM=dim,
        SPLITS=len(shares.sums),
        LARGEST=LARGEST[form.dtype],
        FIXED=form.scale is not None,
        num_warps=min(16, max(1, padded * dim // 256)),
        **options(q.device),
    )
    return QuantisedRows(values, scales, None, q.dtype)


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
