"""Next-token choice: temperature, top-k, top-p, greedy. The order of the filters is the reference's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    logits = _top_k(logits / settings.temperature, settings)
    if settings.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = _behind_top_p(ascending.softmax(dim=-1), settings.top_p)
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def _top_k(logits: Tensor, settings: SamplingSettings) -> Tensor:
    if settings.top_k is None or settings.top_k >= logits.shape[-1]:
        return logits
    kth = logits.topk(settings.top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def _behind_top_p(ascending: Tensor, top_p: float) -> Tensor:
    """Which of ascending probabilities [rows, vocabulary] are left out."""
    dropped = _running_sum(ascending) <= 1 - top_p
    dropped[..., -1] = False
    return dropped


def _running_sum(x: Tensor, piece: int = 512) -> Tensor:
    """``x.cumsum(-1)`` of [rows, n]; on a GPU piece by piece, where one long scan per row leaves the device idle."""
    if not x.is_cuda:
        return x.cumsum(dim=-1)
    size = x.shape[-1]
    inner = pad(x, (0, -size % piece)).unflatten(-1, (-1, piece)).cumsum(dim=-1)
    totals = inner[..., -1]
    return (inner + (totals.cumsum(dim=-1) - totals)[..., None]).flatten(-2)[..., :size]


def sample(logits: Tensor, settings: SamplingSettings, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row: float32 [rows, vocabulary] -> int64 [rows]."""
    if settings.greedy:
        return logits.argmax(dim=-1)
    return pick(logits, settings, torch.empty_like(logits).exponential_(generator=generator))


def pick(logits: Tensor, settings: SamplingSettings, noise: Tensor | None) -> Tensor:
    """`sample` with its randomness given: the token that an exponential race of the probabilities is won by.

    Args:
        logits: float32 [rows, vocabulary].
        settings: How tokens are drawn.
        noise: Exponentially distributed, float32 [rows, vocabulary]; not looked at by a greedy choice.

    Returns:
        int64 [rows].
    """
    if settings.greedy:
        return logits.argmax(dim=-1)
    assert noise is not None
    if settings.top_p == 1:
        return (_top_k(logits / settings.temperature, settings).softmax(dim=-1) / noise).argmax(dim=-1)
    # Tokens race in the order of their probabilities, so that the filter need not be carried back to theirs.
    ascending, order = _top_k(logits / settings.temperature, settings).sort(dim=-1)
    probabilities = ascending.softmax(dim=-1)
    racing = probabilities.masked_fill(_behind_top_p(probabilities, settings.top_p), 0.0)
    return order.gather(-1, (racing / noise).argmax(dim=-1, keepdim=True))[:, 0]
