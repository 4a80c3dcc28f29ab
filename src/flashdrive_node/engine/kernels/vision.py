"""What stands between the matrix products of a vision block: layer norms with the residual, rotation in place, GELU.

Norms and GELU give their rows in the format of the layer that reads them, as in `quantised_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.engine.kernels.linear import apply
from flashdrive_node.engine.kernels.quantised_linear import Rows, row_format
from flashdrive_node.model.rope import rotate


def layer_norm_for(reader: nn.Module, x: Tensor, norm: nn.LayerNorm) -> Rows:
    """`layer_norm` of [T, size], as the layer that reads it takes it."""
    form = row_format(reader, x)
    if form is None or form.group_size is not None:
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    from flashdrive_node.engine.kernels.triton_vision import layer_norm_round

    _check_norm(x, norm.weight, norm.bias)
    return layer_norm_round(x, None, norm.weight, norm.bias, norm.eps, form)[1]


def add_layer_norm_for(reader: nn.Module, x: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Rows]:
    """`add_layer_norm`: the sum, and its norm as the layer that reads it takes it."""
    form = row_format(reader, x)
    if form is None or form.group_size is not None:
        return add_layer_norm(x, update, norm.weight, norm.bias, norm.eps)
    from flashdrive_node.engine.kernels.triton_vision import layer_norm_round

    _check_norm(x, norm.weight, norm.bias)
    _check_update(x, update)
    return layer_norm_round(x, update, norm.weight, norm.bias, norm.eps, form)


def gelu_mlp(hidden: Rows, first: nn.Module, second: nn.Module) -> Tensor:
    """Two layers in whatever format their weights are, with the tanh form of GELU between them: [T, K] -> [T, N]."""
    if isinstance(first, nn.Linear) and isinstance(hidden, Tensor):
        return apply(second, gelu_linear(hidden, first.weight, first.bias))
    between = apply(first, hidden)
    form = row_format(second, between)
    if form is None or form.group_size is not None:
        return apply(second, functional.gelu(between, approximate="tanh"))
    from flashdrive_node.engine.kernels.triton_round_rows import gelu_round

    return apply(second, gelu_round(between, form))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension: [T, size] -> [T, size]."""
    _check_norm(x, weight, bias)
    if uses_triton(x):
        from flashdrive_node.engine.kernels.triton_vision import layer_norm as run

        return run(x, weight, bias, eps)
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum.

    Args:
        x: Residual stream, [T, size].
        update: What is added to it, [T, size].
        weight, bias, eps: Of the norm that reads the sum.

    Returns:
        The sum, rounded to x's type, and its norm; [T, size] each.
    """
    _check_norm(x, weight, bias)
    _check_update(x, update)
    if uses_triton(x):
        from flashdrive_node.engine.kernels.triton_vision import add_layer_norm as run

        return run(x, update, weight, bias, eps)
    x = x + update
    return x, functional.layer_norm(x, weight.shape, weight, bias, eps)


def rotate_queries_and_keys(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys in float32, and round them back.

    Args:
        qkv: Output of the projection, rows q, k, v: [T, 3 * heads * head_dim], contiguous; may be written to.
        heads: Of each.
        cos, sin: Rotations as `rotate` takes them, float32 [T, head_dim].

    Returns:
        q, k and v, [T, heads, head_dim] each.
    """
    head_dim = cos.shape[1]
    if qkv.shape != (len(cos), 3 * heads * head_dim) or not qkv.is_contiguous() or cos.shape != sin.shape:
        raise ValueError(
            f"rotary: contiguous qkv [T, 3 * {heads} * d], cos and sin [T, d] are required, found {list(qkv.shape)}, "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )
    q, k, v = qkv.view(len(qkv), 3, heads, head_dim).unbind(1)
    if uses_triton(qkv):
        from flashdrive_node.engine.kernels.triton_vision import rotate_in_place

        rotate_in_place(qkv, heads, cos, sin)
        return q, k, v
    return rotate(q.float(), cos, sin).to(q.dtype), rotate(k.float(), cos, sin).to(k.dtype), v


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The tanh form of GELU behind a linear layer: x [M, K], weight [N, K] -> [M, N].

    On a GPU the activation is part of the product, on sums that are not rounded before.
    """
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 2 or not weight.shape == bias.shape == x.shape[1:] or weight.dtype != x.dtype or x.stride(1) != 1:
        raise ValueError(
            f"norm: rows [T, size], weight and bias [size] of one type are required, found {list(x.shape)} {x.dtype}, "
            f"{list(weight.shape)} {weight.dtype} and {list(bias.shape)}"
        )


def _check_update(x: Tensor, update: Tensor) -> None:
    if x.shape != update.shape or x.dtype != update.dtype or update.stride(1) != 1:
        raise ValueError(
            f"norm: x and update alike are required, found {list(x.shape)} {x.dtype} and {list(update.shape)} "
            f"{update.dtype}"
        )
