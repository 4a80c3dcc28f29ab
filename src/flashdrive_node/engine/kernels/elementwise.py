"""Norms and the gate of the MLP, each as one pass over its input."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from flashdrive_node.engine.kernels.backend import uses_triton


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
        update: What a layer adds to it, [T, size].
        weight: Of the norm that reads the sum, [size].
        eps: Of the norm.

    Returns:
        The sum, rounded to x's type, and its norm; [T, size] each.
    """
    _check_norm(x, weight)
    if x.shape != update.shape or x.dtype != update.dtype:
        raise ValueError(
            f"norm: x and update alike are required, found {list(x.shape)} {x.dtype} and {list(update.shape)} "
            f"{update.dtype}"
        )
    if uses_triton(x):
        from flashdrive_node.engine.kernels.triton_elementwise import add_rms_norm as run

        return run(x, update, weight, eps)
    x = x + update
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
