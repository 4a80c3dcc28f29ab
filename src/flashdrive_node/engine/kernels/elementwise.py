"""Norms and the gate of the MLP, each as one pass over its input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.engine.kernels.parts import is_parts, summed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension: [T, size] -> [T, size]. One rounding, behind the scale."""
    _check_norm(x, weight)
    if uses_triton(x):
        from flashdrive_node.engine.kernels.triton_elementwise import rms_norm as run

        return run(x, weight, eps)
    return functional.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum.

    Args:
        x: Residual stream, [T, size].
        update: What a layer adds to it, [T, size], or its parts (see `parts`).
        weight: Of the norm that reads the sum, [size].
        eps: Of the norm.

    Returns:
        The sum, rounded to x's type, and its norm; [T, size] each.
    """
    _check_norm(x, weight)
    if is_parts(update):
        alike = update.shape[1:] == x.shape and update.dtype == torch.float32 and update.is_contiguous()
    else:
        alike = update.shape == x.shape and update.dtype == x.dtype
    if not alike:
        raise ValueError(
            f"norm: x and update alike, or float32 parts of it, are required, found {list(x.shape)} {x.dtype} and "
            f"{list(update.shape)} {update.dtype}"
        )
    if uses_triton(x):
        from flashdrive_node.engine.kernels.triton_elementwise import add_rms_norm as run

        return run(x, update, weight, eps)
    x = x + summed(update, x.dtype)
    return x, functional.rms_norm(x, weight.shape, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """The gate of a SwiGLU MLP, silu(gate) * up: [T, 2 * size] with the gate in front -> [T, size].

    silu(gate) is rounded before the product, as in the reference.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate: contiguous [T, 2 * size] is required, found {list(gate_up.shape)}")
    if uses_triton(gate_up):
        from flashdrive_node.engine.kernels.triton_elementwise import silu_mul as run

        return run(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate.contiguous()) * up


def _check_norm(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 2 or weight.shape != x.shape[1:] or weight.dtype != x.dtype or x.stride(1) != 1:
        raise ValueError(
            f"norm: rows [T, size] and weight [size] of one type are required, found {list(x.shape)} {x.dtype} and "
            f"{list(weight.shape)} {weight.dtype}"
        )
