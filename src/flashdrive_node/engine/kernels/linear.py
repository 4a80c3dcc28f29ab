"""Matrix products of few rows, whose time is the reading of the weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.engine.kernels.elementwise import silu_mul
from flashdrive_node.engine.kernels.quantised_linear import Rows, gate_for, quantised_parts, unscaled, whole
from flashdrive_node.engine.kernels.row_formats import Unscaled
from flashdrive_node.model.linear import QuantisedLinear, SideBySide

#: Rows up to which the own kernel is tried.
MAX_ROWS = 64


def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear` without bias, for few rows. Sums are taken in float32 and rounded once.

    Args:
        x: [M, K].
        weight: [N, K].

    Returns:
        [M, N] in x's type.
    """
    if _suits_triton(x, weight):
        from flashdrive_node.engine.kernels.triton_linear import skinny_linear as run

        return run(x, weight)
    return linear(x, weight)


def skinny_parts(x: Tensor, weight: Tensor) -> Tensor:
    """`skinny_linear` for a reader that takes parts (see `parts`): [M, N] in x's type, or float32 [parts, M, N]."""
    if _suits_triton(x, weight):
        from flashdrive_node.engine.kernels.triton_linear import skinny_parts as run

        return run(x, weight)
    return linear(x, weight)


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The first half of a SwiGLU MLP, silu(gate) * up, roundings as in `silu_mul`.

    Args:
        x: [M, K].
        weight: Rows of the gate, then rows of up, [2 * N, K].

    Returns:
        [M, N] in x's type.
    """
    if _suits_triton(x, weight):
        from flashdrive_node.engine.kernels.triton_linear import gated_linear as run

        return run(x, weight)
    return silu_mul(linear(x, weight))


def project(x: Rows, layer: nn.Module) -> Tensor:
    """A linear layer without bias in whatever format its weight is: M rows -> [M, N] in their type."""
    if isinstance(layer, nn.Linear) and isinstance(x, Tensor):
        return skinny_linear(x, layer.weight)
    if isinstance(layer, SideBySide) and isinstance(x, Tensor):
        return torch.cat([project(x, part) for part in layer.parts], dim=-1)
    return whole(quantised_parts(x, layer), x.dtype)


def apply(layer: nn.Module, x: Rows) -> Tensor:
    """A linear layer as its module computes it, bias and all: M rows -> [M, N]. Quantised ones run in their kernels."""
    if isinstance(layer, QuantisedLinear):
        return project(x, layer)
    result: Tensor = layer(x)
    return result


def project_parts(x: Rows, layer: nn.Module) -> Tensor | Unscaled:
    """`project` for a reader that takes parts (see `parts`), and products in front of their scales."""
    if isinstance(layer, nn.Linear) and isinstance(x, Tensor):
        return skinny_parts(x, layer.weight)
    if isinstance(layer, SideBySide):
        return project(x, layer)
    product = unscaled(x, layer)
    return quantised_parts(x, layer) if product is None else product


def gated_project(x: Rows, layer: nn.Module, reader: nn.Module) -> Rows:
    """`gated_linear` of a layer in whatever format its weight is, as the layer that reads it takes it: [M, N / 2]."""
    if isinstance(layer, nn.Linear) and isinstance(x, Tensor):
        return gated_linear(x, layer.weight)
    product = unscaled(x, layer)
    return gate_for(reader, project(x, layer) if product is None else product)


def _suits_triton(x: Tensor, weight: Tensor) -> bool:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"linear: x [M, K] and weight [N, K] of one type are required, found {list(x.shape)} {x.dtype} and "
            f"{list(weight.shape)} {weight.dtype}"
        )
    return uses_triton(x) and len(x) <= MAX_ROWS and x.is_contiguous() and weight.is_contiguous()
