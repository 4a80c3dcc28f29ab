"""Finds the channel scales and pair rotations under which a linear layer loses least by 4-bit weights.

As in ParoQuant (arXiv 2511.10645) the pairs are drawn at random and the angles and scales learned, through the rounding
by straight-through gradients, on inputs that the layer met. Layers that share an input are fitted as one matrix, so
one rotated input serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.givens import pair_index, random_pairs, rotate_by_blocks, rotate_pairs, rotation_blocks
from flashdrive_node.model.int4 import LEVELS, quantise
from flashdrive_node.model.paro_layouts import GROUP_SIZE, ROUNDS
from flashdrive_node.model.paroquant import ALWAYS, NEVER, ParoLinear, ParoWeight, round_tokens

#: Logarithm of the largest scale of a channel: beyond it float16 and int8 activations lose more than weights gain.
_LARGEST_LOG_SCALE = 4.0


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast is learned."""

    steps: int = 100
    #: Inputs of a step.
    rows: int = 256
    #: Of angles (radians) and logarithms of scales, falling to a twentieth.
    rate: float = 0.03
    #: Inputs are rounded to int8, as in the use that is meant.
    int8_inputs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or not self.rate > 0:
            raise InputError(
                "rotation fit: positive steps, rows and rate are required, "
                f"found {self.steps}, {self.rows} and {self.rate}"
            )


@dataclass(frozen=True)
class Fit:
    """A layer in 4 bits, and how far its outputs are from the original's, relative, on inputs it was not fitted on."""

    weight: ParoWeight
    error: float
    #: Of the same groups rounded to the nearest, without scales and rotation.
    nearest_error: float


def fit(
    weight: Tensor,
    inputs: Tensor,
    held_out: Tensor,
    settings: FitSettings,
    progress: Callable[[int, float], None] | None = None,
) -> Fit:
    """Fit one layer.

    Args:
        weight: [N, K], of all layers on the input one above the other; K in groups of 128.
        inputs: What the layer met, [rows, K].
        held_out: The same of other windows, for the errors.
        settings: How to learn.
        progress: Called with the step and its relative error.

    Returns:
        The best of what was met, by the error on `inputs`; plain rounding to the nearest is among it.

    Raises:
        InputError: A shape that 4 bits do not take, or inputs that are not finite.
    """
    rows, columns = weight.shape
    if rows % 8 or columns % GROUP_SIZE:
        raise InputError(f"rows in eights and columns in groups of {GROUP_SIZE} are required, found {rows} x {columns}")
    if not bool(torch.isfinite(inputs).all() and torch.isfinite(held_out).all()):
        raise InputError("finite inputs are required, found inf or nan")
    generator = torch.Generator().manual_seed(settings.seed)
    pairs = random_pairs(columns, ROUNDS, GROUP_SIZE, generator).to(weight.device)
    weight, inputs, held_out = weight.float(), inputs.float(), held_out.float()
    nearest = _quantised(weight, pairs, torch.zeros(ROUNDS, columns // 2), torch.zeros(columns))
    best, best_error = nearest, output_error(nearest, weight, inputs, settings)
    angles, log_scales = _learn(weight, pairs, inputs, settings, generator, progress)
    learned = _quantised(weight, pairs, angles, log_scales)
    if output_error(learned, weight, inputs, settings) < best_error:
        best = learned
    return Fit(best, output_error(best, weight, held_out, settings), output_error(nearest, weight, held_out, settings))


def output_error(layer: ParoWeight, weight: Tensor, inputs: Tensor, settings: FitSettings) -> float:
    """Norm of the outputs' error relative to the outputs' norm."""
    exact = linear(inputs, weight)
    found = ParoLinear(layer, ALWAYS if settings.int8_inputs else NEVER)(inputs)
    return float((found - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _learn(
    weight: Tensor,
    pairs: Tensor,
    inputs: Tensor,
    settings: FitSettings,
    generator: torch.Generator,
    progress: Callable[[int, float], None] | None,
) -> tuple[Tensor, Tensor]:
    """Angles [rounds, K / 2] and logarithms of the weight's channel scales [K]."""
    index = pair_index(pairs, GROUP_SIZE)
    angles = torch.zeros(pairs.shape[0], weight.shape[1] // 2, device=weight.device, requires_grad=True)
    log_scales = torch.zeros(weight.shape[1], device=weight.device, requires_grad=True)
    optimiser = torch.optim.Adam([angles, log_scales], lr=settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps, settings.rate / 20)
    for step in range(settings.steps):
        chosen = torch.randint(len(inputs), (min(settings.rows, len(inputs)),), generator=generator).to(weight.device)
        x = inputs[chosen]
        scales = log_scales.exp()
        blocks = rotation_blocks(index, angles, GROUP_SIZE)
        turned = rotate_by_blocks(x / scales, blocks)
        if settings.int8_inputs:
            q, token_scales = round_tokens(turned.detach())
            turned = turned + (q * token_scales - turned.detach())
        exact = linear(x, weight)
        found = linear(turned, _round_through(rotate_by_blocks(weight * scales, blocks)))
        loss = (found - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            log_scales.clamp_(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE)
        if progress is not None:
            progress(step, float(loss.detach().sqrt()))
    return angles.detach(), log_scales.detach()


def _round_through(weight: Tensor) -> Tensor:
    """Weights rounded in groups; gradients pass the rounding, and stop where a code is at its limit."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.amin(dim=-1, keepdim=True).clamp(max=0), groups.amax(dim=-1, keepdim=True).clamp(min=0)
    scales = (high - low).clamp(min=1e-5) / LEVELS
    zeros = (-_straight_round(low / scales)).clamp(0, LEVELS)
    codes = (_straight_round(groups / scales) + zeros).clamp(0, LEVELS)
    return ((codes - zeros) * scales).flatten(1)


def _straight_round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _quantised(weight: Tensor, pairs: Tensor, angles: Tensor, log_scales: Tensor) -> ParoWeight:
    """The layer with scales and angles as files hold them, and its weight rounded under those."""
    angles = angles.half().to(weight.device)
    input_scales = (-log_scales).exp().half().to(weight.device)
    turned = rotate_pairs(weight / input_scales.float(), pair_index(pairs, GROUP_SIZE), angles.float())
    return ParoWeight(pairs, angles, input_scales, quantise(turned, GROUP_SIZE))
