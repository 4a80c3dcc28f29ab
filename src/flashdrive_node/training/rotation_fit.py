"""Finds the channel scales, pair rotations and rounding under which a linear layer loses least by 4-bit weights.

As in ParoQuant (arXiv 2511.10645) the pairs are drawn at random and the angles and scales learned, through the rounding
by straight-through gradients, on inputs that the layer met. Layers that share an input are fitted as one matrix, so
one rotated input serves them all. In place of ParoQuant's second stage, which learns the weights and the scales behind
the rotation by gradients too, columns make up for each other's rounding (`compensation`): on the bundled model's
layers that leaves four fifths of the error of learning, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.givens import pair_index, random_pairs, rotate_by_blocks, rotate_pairs, rotation_blocks
from flashdrive_node.model.int4 import LEVELS, Int4Weight, group_range, quantise, quantise_with
from flashdrive_node.model.paro_layouts import GROUP_SIZE, ROUNDS
from flashdrive_node.model.paroquant import ALWAYS, NEVER, ParoLinear, ParoWeight, round_tokens
from flashdrive_node.training.compensation import compensated, fitted_to

#: Logarithm of the largest scale of a channel: beyond it float16 and int8 activations lose more than weights gain.
_LARGEST_LOG_SCALE = 4.0


#: Ways to round, and the rows of the calibration that choose between them: the last fifth, which is of other windows.
PAROQUANT, NEAREST = METHODS = ("paroquant", "nearest")
_CHOOSING = 5


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast is learned."""

    #: "paroquant", or "nearest": plain rounding to the nearest, without scales, rotation and learning.
    method: str = "paroquant"
    #: Of scales and rotations.
    steps: int = 100
    #: Whether columns then make up for each other's rounding.
    second_stage: bool = True
    #: Inputs of a step.
    rows: int = 256
    #: Of angles (radians) and logarithms of scales, falling to a twentieth.
    rate: float = 0.03
    #: Whether layers are then rounded again in the order of the stack, each behind the rounded ones (`stack_rounding`).
    in_order: bool = True
    #: Passes over the windows in which the scales of all layers' groups are then learned together (`scale_tuning`).
    tuning_passes: int = 5
    #: Inputs are rounded to int8, as in the use that is meant.
    int8_inputs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"a method of {', '.join(METHODS)} is required, found {self.method!r}")
        if self.steps < 1 or self.rows < 1 or not self.rate > 0 or self.tuning_passes < 0:
            raise InputError(
                "rotation fit: positive steps, rows and rate, and no or more passes of tuning are required, "
                f"found {self.steps}, {self.rows}, {self.rate} and {self.tuning_passes}"
            )

    @property
    def rounds_in_order(self) -> bool:
        """Whether the layers are rounded once more, in order."""
        return self.method == PAROQUANT and self.second_stage and self.in_order

    @property
    def total_steps(self) -> int:
        """Of one layer."""
        return self.steps if self.method == PAROQUANT else 0


@dataclass(frozen=True)
class Fit:
    """A layer in 4 bits, and how far its outputs are from the original's, relative, on inputs it was not fitted on."""

    weight: ParoWeight
    error: float
    #: Before the second stage.
    rotated_error: float
    #: Of the same groups rounded to the nearest, without scales and rotation.
    nearest_error: float

    def packed(self) -> tuple[dict[str, Tensor], list[float]]:
        """Tensors by name, and errors."""
        tensors = dict(zip(ParoWeight._fields[:3], self.weight[:3], strict=True))
        tensors |= dict(zip(Int4Weight._fields, self.weight.matrix, strict=True))
        return tensors, [self.error, self.rotated_error, self.nearest_error]

    @classmethod
    def unpacked(cls, tensors: dict[str, Tensor], errors: list[float]) -> Fit:
        """What `packed` was called for."""
        matrix = Int4Weight(*(tensors[key] for key in Int4Weight._fields))
        turn = {key: tensors[key] for key in ParoWeight._fields[:3]}
        return cls(ParoWeight(**turn, matrix=matrix), *errors)


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
        progress: Called with the step of learning and its relative error.

    Returns:
        The best of what was met, by the error on inputs that were not learned from; plain rounding to the nearest is
        among it.

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
    nearest, _ = _quantised(weight, pairs, torch.zeros(ROUNDS, columns // 2), torch.zeros(columns))
    nearest_error = output_error(nearest, weight, held_out, settings)
    if settings.method == NEAREST:
        return Fit(nearest, nearest_error, nearest_error, nearest_error)
    count = max(1, len(inputs) - len(inputs) // _CHOOSING)
    learning, choosing = inputs[:count], inputs[count:] if count < len(inputs) else inputs

    def better(one: ParoWeight, other: ParoWeight) -> ParoWeight:
        one_error, other_error = (output_error(layer, weight, choosing, settings) for layer in (one, other))
        return other if other_error < one_error else one

    angles, log_scales = _learn(weight, pairs, learning, settings, generator, progress)
    learned, turned = _quantised(weight, pairs, angles, log_scales)
    rotated = better(nearest, learned)
    best = rotated
    if settings.second_stage:
        best = better(rotated, _compensated(learned, turned, product_inputs(learned, learning, settings)))
    error, rotated_error = (output_error(layer, weight, held_out, settings) for layer in (best, rotated))
    return Fit(best, error, rotated_error, nearest_error)


def output_error(layer: ParoWeight, weight: Tensor, inputs: Tensor, settings: FitSettings) -> float:
    """Norm of the outputs' error relative to the outputs' norm."""
    return product_error(layer, inputs, linear(inputs, weight), settings)


def product_error(layer: ParoWeight, inputs: Tensor, wanted: Tensor, settings: FitSettings) -> float:
    """Distance of a layer's outputs [rows, N] from what is wanted, relative to the norm of that."""
    found = ParoLinear(layer, ALWAYS if settings.int8_inputs else NEVER)(inputs)
    return float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))


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
        x = _some(inputs, settings, generator)
        scales = log_scales.exp()
        blocks = rotation_blocks(index, angles, GROUP_SIZE)
        turned = rotate_by_blocks(x / scales, blocks)
        if settings.int8_inputs:
            q, token_scales = round_tokens(turned.detach())
            turned = turned + (q * token_scales - turned.detach())
        exact = linear(x, weight)
        found = linear(turned, _round_through(rotate_by_blocks(weight * scales, blocks)))
        loss = _relative_loss(found, exact)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            log_scales.clamp_(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE)
        if progress is not None:
            progress(step, float(loss.detach().sqrt()))
    return angles.detach(), log_scales.detach()


def rounded_towards(
    layer: ParoWeight, weight: Tensor, inputs: Tensor, wanted: Tensor, settings: FitSettings
) -> ParoWeight:
    """The layer, with its rotation, rounded such that inputs give what is wanted.

    Args:
        layer: Has the scales and the rotation.
        weight: What it stands for, float32 [N, K].
        inputs: What the layer is given, [rows, K].
        wanted: What its outputs should be, [rows, N].
        settings: Whether inputs are rounded.
    """
    found = product_inputs(layer, inputs, settings)
    turn = ParoLinear(layer)
    turned = rotate_pairs(weight / turn.channel_scales.float(), turn.index, turn.angles.float())
    return _compensated(layer, fitted_to(turned, found, wanted), found)


def product_inputs(layer: ParoWeight, inputs: Tensor, settings: FitSettings) -> Tensor:
    """Inputs [rows, K] as the product with the rotated weight gets them, float32."""
    rotated = ParoLinear(layer).rotated_at_once(inputs)
    if not settings.int8_inputs:
        return rotated
    q, token_scales = round_tokens(rotated)
    return q * token_scales


def _compensated(layer: ParoWeight, turned: Tensor, inputs: Tensor) -> ParoWeight:
    """The layer with another rounding of its scaled and rotated weight, on inputs of `product_inputs`."""
    scales, zeros = group_range(turned, GROUP_SIZE)

    def rounded(values: Tensor, column: int) -> Tensor:
        scale, zero = scales[:, column // GROUP_SIZE], zeros[:, column // GROUP_SIZE]
        return (((values / scale).round() + zero).clamp(0, LEVELS) - zero) * scale

    return layer._replace(matrix=quantise_with(compensated(turned, inputs, rounded), scales, zeros))


def _straight_round(x: Tensor) -> Tensor:
    """Rounded; gradients pass as if it were not."""
    return x + (x.round() - x).detach()


def _relative_loss(found: Tensor, exact: Tensor) -> Tensor:
    """Squared error relative to the square of what is exact."""
    return (found - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


def _some(inputs: Tensor, settings: FitSettings, generator: torch.Generator) -> Tensor:
    """Rows for one step, drawn at random."""
    chosen = torch.randint(len(inputs), (min(settings.rows, len(inputs)),), generator=generator)
    return inputs[chosen.to(inputs.device)]


def _round_through(weight: Tensor) -> Tensor:
    """Weights rounded in groups; gradients pass the rounding, and stop where a code is at its limit."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.amin(dim=-1, keepdim=True).clamp(max=0), groups.amax(dim=-1, keepdim=True).clamp(min=0)
    scales = (high - low).clamp(min=1e-5) / LEVELS
    zeros = (-_straight_round(low / scales)).clamp(0, LEVELS)
    codes = (_straight_round(groups / scales) + zeros).clamp(0, LEVELS)
    return ((codes - zeros) * scales).flatten(1)


def _quantised(weight: Tensor, pairs: Tensor, angles: Tensor, log_scales: Tensor) -> tuple[ParoWeight, Tensor]:
    """The layer with scales and angles as files hold them and its weight rounded to the nearest, and that before."""
    angles = angles.half().to(weight.device)
    input_scales = (-log_scales).exp().half().to(weight.device)
    turned = rotate_pairs(weight / input_scales.float(), pair_index(pairs, GROUP_SIZE), angles.float())
    return ParoWeight(pairs, angles, input_scales, quantise(turned, GROUP_SIZE)), turned
