"""What a drafter looks at: outputs of some of the target's layers, collected while tokens run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tapped(NamedTuple):
    """What a drafter looks at: which layers' outputs, for how many of a prompt's last tokens."""

    layer_ids: tuple[int, ...]
    last: int


class Taps:
    """Collects the outputs of some layers while tokens run: pass `see`, then take `states`."""

    def __init__(self, layer_ids: tuple[int, ...], last: int | None = None):
        """Keep the last `last` tokens of a pass, by default all."""
        self._layer_ids, self.last = layer_ids, last
        self._seen: dict[int, Tensor] = {}

    def see(self, layer: int, value: Tensor) -> None:
        """Called behind every layer with its output [T, hidden]."""
        if layer in self._layer_ids:
            self._seen[layer] = value if self.last is None else value[-self.last :]

    def observe(self, name: str, value: Tensor) -> None:
        """`see` for passes that report as `run_layers` does."""
        if name.startswith("layer_out."):
            # Copied: there the output is added to in place where image features come in behind it.
            self.see(int(name.removeprefix("layer_out.")), value.clone())

    def states(self) -> Tensor:
        """Layers side by side in the order of their ids, [tokens, layers * hidden]."""
        return torch.cat([self._seen[layer] for layer in self._layer_ids], dim=-1)
