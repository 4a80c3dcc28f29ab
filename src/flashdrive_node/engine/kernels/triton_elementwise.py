"""Norms and the gate of the MLP in Triton: one program per row, or per stretch of one."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.parts import is_parts


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `elementwise.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm(x, x, weight, out, out, eps, ADD=False)
    return out


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `elementwise.add_rms_norm`."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty_like(total)
    _norm(x, update, weight, total, out, eps, ADD=True)
    return total, out


def _norm(x: Tensor, update: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, ADD: bool) -> None:
    tokens, size = x.shape
    padded = triton.next_power_of_2(size)
    parts = len(update) if is_parts(update) else 0
    _rms_norm[(tokens,)](
        x,
        update,
        weight,
        total,
        out,
        size,
        x.stride(0),
        update.stride(-2),
        update.stride(0),
        eps,
        ADD=ADD,
        PARTS=parts,
        PADDED=padded,
        num_warps=min(16, max(1, padded // 256)),
        **options(x.device),
    )


@triton.jit
def _rms_norm(
    x_ptr,
    update_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    size,
    x_row,
    update_row,
    update_part,
    eps,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    row = tl.program_id(0)
    column = tl.arange(0, PADDED)
    within = column < size
    x = tl.load(x_ptr + row * x_row + column, mask=within, other=0.0).to(tl.float32)
    if ADD:
        update = tl.load(update_ptr + row * update_row + column, mask=within, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            update += tl.load(update_ptr + part * update_part + row * update_row + column, mask=within, other=0.0)
        x += update.to(total_ptr.dtype.element_ty).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * size + column, rounded, mask=within)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(out_ptr + row * size + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=within)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `elementwise.silu_mul`."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    _silu_mul[(tokens, triton.cdiv(size, block))](
        gate_up, out, size, BLOCK=block, num_warps=4, **options(gate_up.device)
    )
    return out


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    follow(EARLY)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=within, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=within, other=0.0).to(tl.float32)
    gated = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + column, (gated * up).to(out.dtype.element_ty), mask=within)
