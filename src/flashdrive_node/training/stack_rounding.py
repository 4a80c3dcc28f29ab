"""Rounds text layers once more in the order in which a token passes them, each behind those that are rounded.

Fitted alone, on the original's inputs, every layer adds its error to those of the layers before it. Here the windows'
states go through the original stack and through the rounded one side by side, and a layer is rounded such that it gives
from the rounded stack's inputs what the original gives from its own (asymmetric calibration, GPTAQ, arXiv 2504.02692).
Layers whose outputs are added to the states make up for what the states are off by, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.attention import attend_causal
from flashdrive_node.model.decoder import DecoderLayer
from flashdrive_node.model.paroquant import ParoWeight
from flashdrive_node.model.rope import mrope_cos_sin, rotate
from flashdrive_node.training.rotation_fit import FitSettings, product_error, rounded_towards
from flashdrive_node.training.stack_error import RoundedProduct
from flashdrive_node.training.text_windows import TextWindow, split_windows

#: Linear layers of a decoder layer in the order in which a token passes them, and those whose outputs are added to it.
PARTS, _ADDED = ("qkv", "o_proj", "gate_up", "down"), ("o_proj", "down")


class _Walk:
    """States of all windows on their way through one stack; between two layers they lie on the host."""

    def __init__(self, model: Alpamayo, windows: Sequence[TextWindow]):
        self.language, self.windows, self.device = model.language, windows, model.device
        self.states = [w.to(self.device).embedded(model.language).cpu() for w in windows]
        self._attended: list[Tensor] = []

    def inputs(self, layer: DecoderLayer, part: str) -> Iterator[Tensor]:
        """What a part of a layer is given, [T, K] for every window; the parts in front of it were `passed`."""
        given: dict[str, Callable[[Tensor], Tensor]] = {
            "qkv": layer.input_norm,
            "o_proj": lambda attended: attended,
            "gate_up": layer.post_norm,
            "down": partial(self._middle, layer),
        }
        for x in self._attended if part == "o_proj" else self.states:
            yield given[part](x.to(self.device))

    def passed(self, layer: DecoderLayer, part: str, number: int) -> None:
        """Take the states past a part of the layer with this number."""
        if part == "qkv":
            self._attended = [self._attend(layer, i) for i in range(len(self.windows))]
        elif part == "o_proj":
            for i, attended in enumerate(self._attended):
                self.states[i] += layer.o_proj(attended.to(self.device)).cpu()
        elif part == "down":
            for i, window in enumerate(self.windows):
                x = self.states[i].to(self.device)
                x = x + layer.down(self._middle(layer, x))
                self.states[i] = window.behind(number, x.cpu())

    def _attend(self, layer: DecoderLayer, i: int) -> Tensor:
        x = self.states[i].to(self.device)
        cos, sin = mrope_cos_sin(self.windows[i].positions.to(self.device), self.language.config, x.dtype)
        q, k, v = layer.project(x)
        return attend_causal(rotate(q, cos, sin), rotate(k, cos, sin).transpose(0, 1), v.transpose(0, 1)).cpu()

    def _middle(self, layer: DecoderLayer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(layer.post_norm(x)).chunk(2, dim=-1)
        return silu(gate) * up


@torch.no_grad()
def round_in_order(
    model: Alpamayo,
    layers: Mapping[str, ParoWeight],
    windows: Sequence[TextWindow],
    rows: int,
    settings: FitSettings,
    done: Mapping[str, ParoWeight],
    took: Callable[[str, ParoWeight], None],
) -> None:
    """Round text layers once more, with the rotations that they have.

    Args:
        model: The original.
        layers: In 4 bits by name, each fitted alone.
        windows: To fit on; the last fifth chooses between the two roundings.
        rows: Tokens of a window's prompt, and at most as many of its text, that are fitted on.
        settings: As the layers were fitted.
        done: What an earlier run took.
        took: Told the name and the better rounding of every layer that is not done.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = [_tokens(window, rows, generator) for window in windows]
    cut = len(torch.cat(chosen[: len(split_windows(windows)[0])]))
    plain, rounded = _Walk(model, windows), _Walk(model, windows)
    for number, module in enumerate(model.language.layers):
        original = cast(DecoderLayer, module)
        layer = copy(original)
        layer._modules = dict(original._modules)  # a copy shares them otherwise
        for part in PARTS:
            name = f"language.layers.{number}.{part}"
            if name in layers:
                weight = done.get(name)
                if weight is None:
                    matrix = original.get_submodule(part).get_parameter("weight").float()
                    given = _rows(rounded.inputs(layer, part), chosen)
                    wanted = linear(_rows(plain.inputs(original, part), chosen), matrix)
                    if part in _ADDED:
                        wanted += (_rows(plain.states, chosen) - _rows(rounded.states, chosen)).to(wanted.device)
                    other = rounded_towards(layers[name], matrix, given[:cut], wanted[:cut], settings)
                    judged = (given[cut:], wanted[cut:]) if cut < len(given) else (given, wanted)
                    weight = min(layers[name], other, key=lambda one: product_error(one, *judged, settings))
                    took(name, weight)
                layer._modules[part] = RoundedProduct(weight, settings.int8_inputs, model.dtype).to(model.device)
            plain.passed(original, part, number)
            rounded.passed(layer, part, number)


def _tokens(window: TextWindow, rows: int, generator: torch.Generator) -> Tensor:
    """Tokens of the prompt at random, and the first ones of the text."""
    of_prompt = torch.randperm(window.prompt, generator=generator)[:rows]
    return torch.cat((of_prompt, torch.arange(window.prompt, len(window.ids))[:rows]))


def _rows(states: Iterable[Tensor], chosen: Sequence[Tensor]) -> Tensor:
    """Some tokens of every window, one below the other, float32."""
    return torch.cat([x[tokens.to(x.device)].float() for x, tokens in zip(states, chosen, strict=True)])
