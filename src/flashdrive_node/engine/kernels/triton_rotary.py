"""Norms of the heads, rotation and the way into the cache in Triton: one program per token and a few heads."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.parts import is_parts
from flashdrive_node.engine.kernels.row_formats import Unscaled

if TYPE_CHECKING:
    from flashdrive_node.engine.kernels.rotary import HeadNorms, KeptKeys


def norm_rope_write(
    product: Tensor | Unscaled,
    norms: HeadNorms,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    kept: KeptKeys | None,
) -> Tensor:
    """See `rotary.norm_rope_write`."""
    unscaled = product if isinstance(product, Unscaled) else None
    qkv = product.sums if isinstance(product, Unscaled) else product
    (tokens, width), (kv_heads, _, dim) = qkv.shape[-2:], keys.shape
    heads = width // dim - 2 * kv_heads
    q = torch.empty(tokens, heads, dim, dtype=keys.dtype, device=qkv.device)
    together = gcd(heads, kv_heads, 8)  # heads of one program: a power of two that divides both
    _norm_rope_write[(tokens, (heads + 2 * kv_heads) // together)](
        qkv,
        cos if unscaled is None else unscaled.token_scales,
        cos if unscaled is None else unscaled.row_scales,
        norms.q,
        norms.k,
        cos,
        sin,
        q,
        keys,
        values,
        slots,
        keys if kept is None else kept.store,
        slots if kept is None else kept.places,
        norms.eps,
        tokens * width,
        cos.stride(0),
        sin.stride(0),
        keys.stride(0),
        keys.stride(1),
        0 if kept is None else kept.store.stride(0),
        0 if kept is None else kept.store.stride(1),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        TOGETHER=together,
        KEEP=kept is not None,
        PARTS=len(qkv) if is_parts(qkv) else 1,
        UNSCALED=unscaled is not None,
        num_warps=2 if together * dim >= 512 else 1,
        **options(qkv.device),
    )
    return q


@triton.jit
def _norm_rope_write(
    qkv,
    token_scales,
    row_scales,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    keys,
    values,
    slots,
    store,
    places,
    eps,
    part_stride,
    cos_row,
    sin_row,
    kv_head,
    kv_slot,
    store_head,
    store_place,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOGETHER: tl.constexpr,
    KEEP: tl.constexpr,
    PARTS: tl.constexpr,
    UNSCALED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Heads in the order of the projection: queries, keys, values. A head is taken in halves, which rotation mixes."""
    follow(EARLY)
    token = tl.program_id(0)
    first = tl.program_id(1) * TOGETHER
    HALF: tl.constexpr = DIM // 2
    lane = tl.arange(0, TOGETHER)[:, None]
    column = tl.arange(0, HALF)[None, :]
    source = qkv + token * (HEADS + 2 * KV_HEADS) * DIM + (first + lane) * DIM + column
    left_raw, right_raw = tl.load(source), tl.load(source + HALF)
    for part in tl.static_range(1, PARTS):
        left_raw += tl.load(source + part * part_stride)
        right_raw += tl.load(source + part * part_stride + HALF)
    if UNSCALED:
        factor = tl.load(token_scales + token)
        factors = row_scales + (first + lane) * DIM + column
        left_raw = left_raw.to(tl.float32) * factor * tl.load(factors)
        right_raw = right_raw.to(tl.float32) * factor * tl.load(factors + HALF)
    rounded = q_out.dtype.element_ty
    left_raw, right_raw = left_raw.to(rounded), right_raw.to(rounded)
    slot = tl.load(slots + token)
    if first >= HEADS + KV_HEADS:
        target = values + (first - HEADS - KV_HEADS + lane) * kv_head + slot * kv_slot + column
        tl.store(target, left_raw)
        tl.store(target + HALF, right_raw)
        return
    weight = k_weight if first >= HEADS else q_weight
    left, right = left_raw.to(tl.float32), right_raw.to(tl.float32)
    scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / DIM + eps)[:, None]
    left_normed = (left * scale * tl.load(weight + column).to(tl.float32)).to(rounded)
    right_normed = (right * scale * tl.load(weight + HALF + column).to(tl.float32)).to(rounded)
    left, right = left_normed.to(tl.float32), right_normed.to(tl.float32)
    cos_left = tl.load(cos + token * cos_row + column).to(tl.float32)
    cos_right = tl.load(cos + token * cos_row + HALF + column).to(tl.float32)
    sin_left = tl.load(sin + token * sin_row + column).to(tl.float32)
    sin_right = tl.load(sin + token * sin_row + HALF + column).to(tl.float32)
    # As `rotate` on a GPU: the straight product is rounded to the rotation's type, the other enters the sum unrounded.
    exact = cos.dtype.element_ty
    turned_left = ((left * cos_left).to(exact).to(tl.float32) + right * sin_left).to(rounded)
    turned_right = ((right * cos_right).to(exact).to(tl.float32) + left * sin_right).to(rounded)
    if first < HEADS:
        target = q_out + token * HEADS * DIM + (first + lane) * DIM + column
        tl.store(target, turned_left)
        tl.store(target + HALF, turned_right)
    else:
        target = keys + (first - HEADS + lane) * kv_head + slot * kv_slot + column
        tl.store(target, turned_left)
        tl.store(target + HALF, turned_right)
        if KEEP:
            place = tl.load(places + token)
            target = store + (first - HEADS + lane) * store_head + place * store_place + column
            tl.store(target, left_normed)
            tl.store(target + HALF, right_normed)
