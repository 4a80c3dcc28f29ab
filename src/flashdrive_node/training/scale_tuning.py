"""Learns the scales of all text layers' groups together, so that texts and plans are the original's.

Behind the rounding of layer after layer, whose measure is what each gives out, this is the whole model's: codes, zero
points and rotations stay, and one factor per group is learned by gradients from what the original answers to the same
windows (as EfficientQAT's second phase, arXiv 2407.11062, which learns from a text's labels). The flow's velocities
count most, and keys, values and states hold on to what windows alone would not tell.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm import tqdm

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.int4 import PackedInt4, dequantise, unpack_groups
from flashdrive_node.model.paroquant import ParoLinear, ParoWeight, round_tokens
from flashdrive_node.training.rotation_fit import FitSettings
from flashdrive_node.training.stack_error import (
    Answer,
    RoundedProduct,
    answer,
    divergence,
    plain_answer,
    replaced,
)
from flashdrive_node.training.text_windows import TextWindow, split_windows

logger = logging.getLogger(__name__)

#: Of the factors, at its peak: with eight times as much the held-out error grew.
_RATE, _BETAS = 5e-4, (0.9, 0.99)
#: Share of the steps over which the rate rises, and of its peak at which it ends.
_WARM_UP, _FINAL_SHARE = 1 / 15, 0.05
#: Windows of a step, and steps between two that are kept.
_WINDOWS, _KEPT_EVERY = 2, 25
#: Weights of the velocities' mean square and of the states' relative one; the others' are 1.
_VELOCITY, _STATES = 3.0, 0.1
#: Divides running sums along a path, so that white errors keep about their size.
_SUM_SCALE = 8.0

#: Of Adam, which the next step depends on.
_MOMENTS = ("exp_avg", "exp_avg_sq")

#: Tensors by name, and the number of steps that are done.
State = tuple[dict[str, Tensor], list[float]]


def tune_scales(
    model: Alpamayo,
    layers: Mapping[str, ParoWeight],
    windows: Sequence[TextWindow],
    settings: FitSettings,
    kept: State | None = None,
    keep: Callable[[State], None] = lambda state: None,
) -> dict[str, ParoWeight]:
    """Learn the scales of all groups from what the original answers.

    Args:
        model: The original.
        layers: In 4 bits by name.
        windows: To learn from, on the host; the last fifth decides whether what was learned is better.
        settings: Passes over the windows, the seed, and whether inputs are rounded.
        kept: What an earlier run told `keep` last.
        keep: Told the state every few steps.

    Returns:
        The layers with the scales that were learned, or as they are where these are no better.
    """
    learned, choosing = split_windows(windows)
    products = {
        name: TunedProduct(weight, settings.int8_inputs, model.dtype).to(model.device)
        for name, weight in layers.items()
    }
    factors = {name: product.factors for name, product in products.items()}
    optimiser = torch.optim.Adam(factors.values(), lr=_RATE, betas=_BETAS)
    order = _order(len(learned), settings)
    steps = -(-len(order) // _WINDOWS)
    first = _go_on(optimiser, factors, kept) if kept else 0
    with tqdm(total=steps, initial=first, desc="scales", unit="step", disable=not steps) as bar:
        for step in range(first, steps):
            for group in optimiser.param_groups:
                group["lr"] = _RATE * _share(step, steps)
            total = 0.0
            drawn = order[_WINDOWS * step : _WINDOWS * (step + 1)]
            for place, number in enumerate(drawn, _WINDOWS * step):
                generator = torch.Generator().manual_seed(settings.seed + place)
                loss = _loss(model, products, learned[number], generator) / len(drawn)
                loss.backward()
                total += float(loss.detach())
            optimiser.step()
            optimiser.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{total:.5f}", refresh=False)
            if (step + 1) % _KEPT_EVERY == 0 or step + 1 == steps:
                keep(_state(optimiser, factors, step + 1))
    tuned = {name: product.tuned() for name, product in products.items()}
    before, after = (_mean_loss(model, x, choosing, settings) for x in (layers, tuned))
    logger.info("scales: loss %.5f before, %.5f after, on windows that choose", before, after)
    return tuned if after < before else dict(layers)


class TunedProduct(nn.Module):
    """A layer in 4 bits whose groups' scales are learned; its matrix is unpacked in every pass, and not kept."""

    #: What is learned: a group's scale is ``1 + factors`` times as large. Float32 [N, groups].
    factors: nn.Parameter

    def __init__(self, weight: ParoWeight, int8_inputs: bool, dtype: torch.dtype):
        super().__init__()
        self.weight, self.layer = weight, ParoLinear(weight)
        self.int8_inputs, self.dtype = int8_inputs, dtype
        self.factors = nn.Parameter(torch.zeros_like(weight.matrix.scales, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] of the same type; gradients pass the rounding of inputs as if there were none."""
        turned = self.layer.rotated_at_once(x).flatten(0, -2)
        scales = self.layer.scales.float().T * (1 + self.factors)
        out = _Product.apply(turned, scales, self.layer.packed, self.int8_inputs, self.dtype)
        return cast(Tensor, out).view(*x.shape[:-1], -1).to(x.dtype)

    def tuned(self) -> ParoWeight:
        """The layer with the scales that were learned, as files hold them."""
        matrix = self.weight.matrix
        scales = matrix.scales.float() * (1 + self.factors.detach().to(matrix.scales.device))
        return self.weight._replace(matrix=matrix._replace(scales=scales.to(matrix.scales.dtype)))


class _Product(torch.autograd.Function):
    """Rows of inputs with a matrix in groups; keeps 8-bit inputs and the codes alone for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, turned: Tensor, scales: Tensor, packed: PackedInt4, int8_inputs: bool, dtype: torch.dtype
    ) -> Tensor:
        """float32 [rows, K] and [N, groups] -> float32 [rows, N]."""
        ctx.packed, ctx.dtype, ctx.int8_inputs = packed, dtype, int8_inputs
        q, token_scales = round_tokens(turned) if int8_inputs else (turned, turned.new_ones(()))
        ctx.save_for_backward(q.to(torch.int8 if int8_inputs else dtype), token_scales, scales)
        return linear(q.to(dtype), _matrix(packed, scales).to(dtype)).float() * token_scales

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the inputs and of the scales."""
        (gradient,) = gradients
        q, token_scales, scales = ctx.saved_tensors
        of_inputs = linear(gradient.to(ctx.dtype), _matrix(ctx.packed, scales).to(ctx.dtype).T).float()
        # With the tokens' scales at the outputs' gradient, inputs are whole numbers, which any type holds.
        scaled = (gradient * token_scales).to(ctx.dtype)
        of_matrix = linear(scaled.T, q.to(ctx.dtype).T).float()
        per_scale = of_matrix * _matrix(ctx.packed, torch.ones_like(scales))
        of_scales = per_scale.unflatten(1, (scales.shape[1], -1)).sum(dim=-1)
        return of_inputs, of_scales, None, None, None


def _matrix(packed: PackedInt4, scales: Tensor) -> Tensor:
    """The matrix with other scales, float32 [N, K]."""
    return dequantise(unpack_groups(packed)._replace(scales=scales))


def _loss(model: Alpamayo, products: Mapping[str, nn.Module], window: TextWindow, generator: torch.Generator) -> Tensor:
    """Of one window."""
    placed = window.to(model.device)
    exact, points = plain_answer(model, placed, generator)
    with replaced(model, products):
        return _distance(answer(model, placed, points), exact)


def _distance(found: Answer, exact: Answer) -> Tensor:
    """What is minimised."""
    velocity = found.velocity - exact.velocity
    summed = velocity.cumsum(dim=2) / _SUM_SCALE
    keys_values = torch.stack([_relative(a, b) for a, b in zip(found.keys_values, exact.keys_values, strict=True)])
    return (
        divergence(found, exact)
        + _VELOCITY * velocity.square().mean()
        + summed.square().mean()
        + keys_values.mean()
        + _STATES * _relative(found.states, exact.states)
    )


def _relative(found: Tensor, exact: Tensor) -> Tensor:
    """Squared error relative to the squares of what is exact."""
    found, exact = found.float(), exact.float()
    return (found - exact).square().sum() / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _mean_loss(
    model: Alpamayo, layers: Mapping[str, ParoWeight], windows: Sequence[TextWindow], settings: FitSettings
) -> float:
    """Of layers as files hold them, over some windows."""
    products = {
        name: RoundedProduct(weight, settings.int8_inputs, model.dtype).to(model.device)
        for name, weight in layers.items()
    }
    losses = [
        _loss(model, products, window, torch.Generator().manual_seed(number)) for number, window in enumerate(windows)
    ]
    return float(torch.stack(losses).mean())


def _order(windows: int, settings: FitSettings) -> list[int]:
    """Numbers of the windows, pass by pass in another order."""
    generator = torch.Generator().manual_seed(settings.seed)
    passes = range(settings.tuning_passes)
    return [number for _ in passes for number in torch.randperm(windows, generator=generator).tolist()]


def _share(step: int, steps: int) -> float:
    """Of the peak rate: it rises, and falls by a cosine over all steps."""
    rise = min(1.0, (step + 1) / max(1.0, _WARM_UP * steps))
    return rise * (_FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _state(optimiser: torch.optim.Adam, factors: Mapping[str, Tensor], steps: int) -> State:
    """What the next step depends on."""
    tensors = {name: tensor.detach() for name, tensor in factors.items()}
    for name, tensor in factors.items():
        tensors |= {f"{name}.{key}": optimiser.state[tensor][key] for key in _MOMENTS}
    return tensors, [float(steps)]


@torch.no_grad()
def _go_on(optimiser: torch.optim.Adam, factors: Mapping[str, Tensor], kept: State) -> int:
    """Take a state over; gives the number of steps that are done."""
    tensors, (steps,) = kept
    for name, tensor in factors.items():
        tensor.copy_(tensors[name])
        moments = {key: tensors[f"{name}.{key}"].to(tensor.device) for key in _MOMENTS}
        optimiser.state[tensor] = {"step": torch.tensor(steps), **moments}
    return int(steps)
