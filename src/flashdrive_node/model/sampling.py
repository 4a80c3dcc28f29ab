"""Next-token choice: temperature, top-k, top-p, greedy. The order of the filters is the reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.model.errors import InputError


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. ``temperature`` 0 or ``top_k`` 1 is greedy."""

    temperature: float = 0.6
    top_p: float = 0.98
    top_k: int | None = None
    #: Tokens generated at most.
    max_length: int = 128

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature must be 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1 or absent, found {self.top_k}")
        if self.max_length < 1:
            raise InputError(f"max_length must be at least 1, found {self.max_length}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1


def filter_logits(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Logits after temperature, top-k and top-p: [rows, vocabulary], dropped tokens at -inf.

    Top-p keeps the likeliest tokens until their sum reaches p, and always one.
    """
    logits = logits / settings.temperature
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        kth = logits.topk(settings.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if settings.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - settings.top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def sample(logits: Tensor, settings: SamplingSettings, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row: float32 [rows, vocabulary] -> int64 [rows]."""
    if settings.greedy:
        return logits.argmax(dim=-1)
    probabilities = filter_logits(logits, settings).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
