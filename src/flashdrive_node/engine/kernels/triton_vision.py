"""Layer norms and the rotation of the vision tower in Triton: one program per row, or per token and part."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.row_formats import LARGEST, QuantisedRows, RowFormat
from flashdrive_node.engine.kernels.triton_round_rows import row_scale, within


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """See `vision.layer_norm`; the result is in `dtype`, by default x's type."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    _norm(x, x, weight, bias, out, out, eps, ADD=False)
    return out


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `vision.add_layer_norm`."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty_like(total)
    _norm(x, update, weight, bias, total, out, eps, ADD=True)
    return total, out


def layer_norm_round(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float, form: RowFormat
) -> tuple[Tensor, QuantisedRows]:
    """The sum where there is an update, else x, and its norm in a form without groups."""
    total = x if update is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values = torch.empty(x.shape, dtype=form.dtype, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    given = x if update is None else update
    _norm(x, given, weight, bias, total, values, eps, ADD=update is not None, scales=scales, fixed=form.scale)
    return total, QuantisedRows(values, scales, None, x.dtype)


def _norm(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor,
    total: Tensor,
    out: Tensor,
    eps: float,
    ADD: bool,
    scales: Tensor | None = None,
    fixed: float | None = None,
) -> None:
    tokens, size = x.shape
    _layer_norm[(tokens,)](
        x,
        update,
        weight,
        bias,
        total,
        out,
        x if scales is None else scales,
        size,
        x.stride(0),
        update.stride(0),
        eps,
        fixed or 0.0,
        ADD=ADD,
        LARGEST=0.0 if scales is None else LARGEST[out.dtype],
        FIXED=fixed is not None,
        PADDED=triton.next_power_of_2(size),
        num_warps=4,
        **options(x.device),
    )


@triton.jit
def _layer_norm(
    x_ptr,
    update_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    out_ptr,
    scales_ptr,
    size,
    x_row,
    update_row,
    eps,
    fixed,
    ADD: tl.constexpr,
    LARGEST: tl.constexpr,
    FIXED: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    known = column < size
    x = tl.load(x_ptr + row * x_row + column, mask=known, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(update_ptr + row * update_row + column, mask=known, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * size + column, rounded, mask=known)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, 0) / size
    centred = tl.where(known, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / size + eps)
    weight = tl.load(weight_ptr + column, mask=known, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=known, other=0.0).to(tl.float32)
    y = centred * scale * weight + bias
    if LARGEST > 0.0:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        scale = row_scale(tl.abs(y), y * 0.0, fixed, LARGEST, FIXED)
        tl.store(scales_ptr + row, scale)
        y = within(y, scale, LARGEST)
    tl.store(out_ptr + row * size + column, y.to(out_ptr.dtype.element_ty), mask=known)


def rotate_in_place(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first two thirds of every row, head by head (see `vision.rotate_queries_and_keys`)."""
    half = cos.shape[1] // 2
    _rotate[(len(qkv), 2)](
        qkv,
        cos,
        sin,
        qkv.stride(0),
        HEADS=heads,
        PADDED_HEADS=triton.next_power_of_2(heads),
        HALF=half,
        PADDED_HALF=triton.next_power_of_2(half),
        num_warps=8,
        **options(qkv.device),
    )


@triton.jit
def _rotate(
    qkv,
    cos,
    sin,
    row_stride,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED_HEADS)[:, None]
    column = tl.arange(0, PADDED_HALF)[None, :]
    within = (head < HEADS) & (column < HALF)
    angle = row * 2 * HALF + column
    known = column < HALF
    # Both halves of the cosine are equal, those of the sine are opposite.
    c = tl.load(cos + angle, mask=known, other=0.0)
    s = tl.load(sin + angle + HALF, mask=known, other=0.0)
    place = qkv + row * row_stride + (tl.program_id(1) * HEADS + head) * 2 * HALF + column
    first = tl.load(place, mask=within, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=within, other=0.0).to(tl.float32)
    tl.store(place, (first * c - second * s).to(qkv.dtype.element_ty), mask=within)
    tl.store(place + HALF, (second * c + first * s).to(qkv.dtype.element_ty), mask=within)
