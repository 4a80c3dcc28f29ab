"""How far a model is off whose text layers are rounded, all of them together: keys and values, texts and plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax

from flashdrive_node.model import batched
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.flow_matching import integrate
from flashdrive_node.model.int4 import dequantise
from flashdrive_node.model.paroquant import ParoLinear, ParoWeight, round_tokens
from flashdrive_node.model.vision import VisionFeatures
from flashdrive_node.training.text_windows import TextWindow

#: Noisy actions of a window that velocities are compared at; their flow times lie in as many equal parts of 0 to 1.
_SAMPLES = 4


@dataclass(frozen=True)
class StackError:
    """How far the model is from the original, all text layers rounded, on windows held out; relative norms."""

    #: Of keys and values of all layers, which the expert reads, too.
    keys_values: float
    #: Of the states behind the last norm that texts are drawn from.
    states: float
    #: Of the flow's velocities, and of their running sums along the path, which is what moves it.
    velocity: float
    summed: float
    #: Of the distribution of a text's next token: Kullback-Leibler divergence, nats per token.
    divergence: float
    #: Tokens of texts, and those with another likeliest one.
    tokens: int
    changed: int


class FlowPoints(NamedTuple):
    """Where velocities are compared: on straight lines from noise to actions that the original plans."""

    #: Noisy actions, float32 [1, samples, waypoints, 2], and flow times [1, samples].
    x: Tensor
    t: Tensor


class Answer(NamedTuple):
    """What a model makes of a window and the text behind it; can be differentiated."""

    #: Of all layers, [2 * layers, 1, kv_heads, T, head_dim].
    keys_values: Tensor
    #: That texts are drawn from, [text + 1, hidden], and their logits, float32 [text + 1, vocabulary].
    states: Tensor
    logits: Tensor
    #: At `FlowPoints`, float32 [1, samples, waypoints, 2].
    velocity: Tensor


class RoundedProduct(nn.Module):
    """A layer in 4 bits for many rows: its matrix is unpacked once."""

    matrix: Tensor

    def __init__(self, weight: ParoWeight, int8_inputs: bool, dtype: torch.dtype):
        super().__init__()
        self.layer, self.int8_inputs, self.dtype = ParoLinear(weight), int8_inputs, dtype
        self.register_buffer("matrix", dequantise(weight.matrix).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] of the same type."""
        turned = self.layer.rotated_at_once(x)
        if not self.int8_inputs:
            return linear(turned.to(self.dtype), self.matrix).to(x.dtype)
        q, scale = round_tokens(turned)
        return (linear(q.to(self.dtype), self.matrix).float() * scale).to(x.dtype)


def answer(model: Alpamayo, window: TextWindow, points: FlowPoints) -> Answer:
    """Read a window and its text at once, and take the expert's velocities behind them.

    Args:
        model: The network.
        window: On the model's device.
        points: Of `plain_answer`.
    """
    hidden, context = _read(model, window)
    return _answer(model, window, hidden, context, points)


@torch.no_grad()
def plain_answer(model: Alpamayo, window: TextWindow, generator: torch.Generator) -> tuple[Answer, FlowPoints]:
    """The original's answer and the points to compare others at.

    Args:
        model: The original.
        window: On the model's device.
        generator: Of noise and flow times, on the host.
    """
    hidden, context = _read(model, window)
    shape, device = (1, _SAMPLES, model.config.action_space.n_waypoints, 2), window.ids.device
    start, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    t = (torch.rand(shape[:2], generator=generator) + torch.arange(_SAMPLES)).to(device) / _SAMPLES
    planned = integrate(batched.velocity_field(model, context, _SAMPLES), start, model.config.flow.num_inference_steps)
    points = FlowPoints(torch.lerp(noise, planned, t[..., None, None]), t)
    return _answer(model, window, hidden, context, points), points


def divergence(found: Answer, exact: Answer) -> Tensor:
    """Of the texts' next tokens, nats per token."""
    theirs, ours = log_softmax(exact.logits, dim=-1), log_softmax(found.logits, dim=-1)
    return kl_div(ours, theirs, reduction="batchmean", log_target=True)


@torch.no_grad()
def stack_error(
    model: Alpamayo, layers: Mapping[str, ParoWeight], windows: Sequence[TextWindow], int8_inputs: bool
) -> StackError:
    """Compare the model with the same one with text layers in 4 bits, on the same prompts, texts and noise.

    Args:
        model: The original.
        layers: In 4 bits by name.
        windows: Prompts and texts, on the host.
        int8_inputs: Whether inputs are rounded.
    """
    products = {
        name: RoundedProduct(weight, int8_inputs, model.dtype).to(model.device) for name, weight in layers.items()
    }
    sums = torch.zeros(4, 2, dtype=torch.float64)
    apart = 0.0
    tokens = changed = 0
    for number, window in enumerate(windows):
        placed = window.to(model.device)
        exact, points = plain_answer(model, placed, torch.Generator().manual_seed(number))
        with replaced(model, products):
            found = answer(model, placed, points)
        pairs = zip(_compared(found), _compared(exact), strict=True)
        sums += torch.stack([torch.stack((_squares(a - b), _squares(b))) for a, b in pairs]).cpu()
        apart += float(divergence(found, exact)) * len(exact.logits)
        tokens += len(exact.logits)
        changed += int((found.logits.argmax(dim=-1) != exact.logits.argmax(dim=-1)).sum())
    keys_values, states, velocity, summed = (sums[:, 0] / sums[:, 1]).sqrt().tolist()
    return StackError(keys_values, states, velocity, summed, apart / tokens, tokens, changed)


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the place of others, and these back."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def _read(model: Alpamayo, window: TextWindow) -> tuple[Tensor, BatchContext]:
    """States of all tokens, [1, T, hidden], and their keys and values."""
    features = VisionFeatures(window.features.embeds[None], [x[None] for x in window.features.deepstack])
    ids, positions = window.ids[None], window.positions
    hidden, keys, values = batched.prefill(model, ids, positions, features, window.image_index)
    tokens = ids.shape[1]
    return hidden, BatchContext(keys, values, ids.new_tensor([tokens]), int(positions[0, -1]) - tokens + 1)


def _answer(model: Alpamayo, window: TextWindow, hidden: Tensor, context: BatchContext, points: FlowPoints) -> Answer:
    states = hidden[0, window.prompt - 1 :]
    velocity = batched.velocity_field(model, context, points.x.shape[1])(points.x, points.t)
    return Answer(torch.stack((*context.keys, *context.values)), states, model.language.logits(states), velocity)


def _compared(x: Answer) -> tuple[Tensor, ...]:
    """What has a relative norm, in the order of `StackError`."""
    return x.keys_values, x.states, x.velocity, x.velocity.cumsum(dim=2)


def _squares(x: Tensor) -> Tensor:
    return x.double().square().sum()
