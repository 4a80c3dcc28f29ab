"""Matrix products of few rows, whose time is the reading of the weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from flashdrive_node.engine.kernels.backend import uses_triton

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
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"linear: x [M, K] and weight [N, K] of one type are required, found {list(x.shape)} {x.dtype} and "
            f"{list(weight.shape)} {weight.dtype}"
        )
    if uses_triton(x) and len(x) <= MAX_ROWS and x.is_contiguous() and weight.is_contiguous():
        from flashdrive_node.engine.kernels.triton_linear import skinny_linear as run

        return run(x, weight)
    return linear(x, weight)


def project(x: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer without bias in whatever format its weight is: [M, K] -> [M, N] in x's type."""
    if isinstance(layer, nn.Linear):
        return skinny_linear(x, layer.weight)
    result: Tensor = layer(x)
    return result
