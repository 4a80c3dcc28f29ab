"""The second stage of a 4-bit layer's calibration: which way each weight is rounded, and by what scale.

Behind scales and rotations that stay as they are, the weights themselves and the scale of each group are learned
through the rounding (straight-through gradients), so that the layer's outputs change least. As in ParoQuant (arXiv
2511.10645, second stage); here a weight moves in units of its group's step, so that one rate fits all layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashdrive_node.model.int4 import LEVELS, group_range, quantise_with
from flashdrive_node.model.paroquant import ParoWeight

#: Of the weights in steps of their group and of the scales' logarithms, in relation to each other.
_SCALE_RATE = 0.1
#: A weight that is further from its value, in steps, fits the rows of the calibration and nothing else.
_FARTHEST = 1.0


def straight_round(x: Tensor) -> Tensor:
    """Rounded; gradients pass as if it were not."""
    return x + (x.round() - x).detach()


def relative_loss(found: Tensor, exact: Tensor) -> Tensor:
    """Squared error relative to the square of what is exact."""
    return (found - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def refine(
    layer: ParoWeight,
    turned: Tensor,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    rate: float,
    progress: Callable[[int, float], None] | None = None,
) -> ParoWeight:
    """Learn the rounding of a layer's weight.

    Args:
        layer: Its rotation, and its weight rounded to the nearest.
        turned: The scaled and rotated weight before rounding, float32 [N, K].
        batches: By step, inputs as the product gets them (rotated, and rounded where they are), [rows, K], and the
            layer's exact outputs of them, [rows, N].
        steps: Of learning.
        rate: Of the weights, in steps of their groups.
        progress: Called with the step and its relative error.

    Returns:
        The layer with another matrix.
    """
    size = layer.matrix.group_size
    first_scales, zeros = group_range(turned, size)
    groups = turned.unflatten(1, (-1, size))
    shifts = torch.zeros_like(groups, requires_grad=True)
    growth = torch.zeros_like(first_scales, requires_grad=True)
    optimiser = torch.optim.Adam([{"params": [shifts], "lr": rate}, {"params": [growth], "lr": rate * _SCALE_RATE}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, 0.0)
    for step in range(steps):
        inputs, exact = batches(step)
        scales = first_scales * growth.exp()
        codes = (straight_round(groups / scales[..., None] + shifts) + zeros[..., None]).clamp(0, LEVELS)
        loss = relative_loss(linear(inputs, ((codes - zeros[..., None]) * scales[..., None]).flatten(1)), exact)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            shifts.clamp_(-_FARTHEST, _FARTHEST)
        if progress is not None:
            progress(step, float(loss.detach().sqrt()))
    with torch.no_grad():
        # As the file has them: what is rounded must be rounded by the scale that it will be read with.
        scales = (first_scales * growth.exp()).half().float()
        moved = groups + shifts * scales[..., None]
        return layer._replace(matrix=quantise_with(moved.flatten(1), scales, zeros))
