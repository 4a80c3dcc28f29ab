"""What queries may see of a cache, as a few numbers per query on the device instead of a dense mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Visible:
    """Slots that each of T queries sees: ``0 .. limit`` and its spans, which lie behind the limit and do not overlap.

    A query may see nothing. The tensors are read when a kernel runs, so a captured graph follows their content.
    """

    #: int32 [T].
    limits: Tensor
    #: First slot and end of further stretches, int32 [T, n, 2], n from 0 to 2. Empty where the end is not above the
    #: first.
    spans: Tensor

    def __post_init__(self) -> None:
        tokens, spans = len(self.limits), tuple(self.spans.shape)
        if self.limits.ndim != 1 or spans not in [(tokens, n, 2) for n in range(3)]:
            raise ValueError(
                f"visibility: limits [T] and spans [T, 0..2, 2] are required, found {list(self.limits.shape)} and "
                f"{list(spans)}"
            )
        for name, tensor in (("limits", self.limits), ("spans", self.spans)):
            if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise ValueError(f"visibility: {name} must be contiguous int32, found {tensor.dtype}")

    def mask(self, slots: int) -> Tensor:
        """True where a query may look, bool [T, slots]."""
        slot = torch.arange(slots, device=self.limits.device)
        within = (slot >= self.spans[..., :1]) & (slot < self.spans[..., 1:])  # [T, n, slots]
        return (slot < self.limits[:, None]) | within.any(dim=1)

    @cached_property
    def seen(self) -> Seen:
        """On a CPU, where it is read once for all layers: the mask of the slots up to the last that any query sees."""
        end = max((int(edges.max()) for edges in (self.limits, self.spans[..., 1]) if edges.numel()), default=0)
        mask = self.mask(end)
        hidden = ~mask.any(dim=0)[:, None]
        return Seen(mask, hidden if bool(hidden.any()) else None, end > 0 and bool(mask.all()))


class Seen(NamedTuple):
    """What queries see of the first slots of a cache."""

    #: bool [T, slots].
    mask: Tensor
    #: Slots that none sees, bool [slots, 1]; None where there is no such slot.
    hidden: Tensor | None
    #: Whether every query sees every slot.
    whole: bool


def up_to(limits: Tensor) -> Visible:
    """Every query sees the slots in front of its own limit: integer [T]. With limit = slot + 1 this is causality."""
    limits = limits.to(torch.int32)
    return Visible(limits, limits.new_zeros(len(limits), 0, 2))


def block_visibility(prefix: Tensor, used: Tensor, stretch: int, size: int) -> Visible:
    """A block of tokens of each text, causal within the text; texts share a prefix and have a stretch of slots each.

    Args:
        prefix: Slots that all texts share, integer [1].
        used: Tokens of each text in front of its block, integer [rows].
        stretch: Slots per text; text r starts in slot ``prefix + r * stretch``.
        size: Tokens per block. Query ``r * size + j`` is token j of text r's block.
    """
    rows, device = len(used), used.device
    ends = prefix + used[:, None] + torch.arange(1, size + 1, device=device)  # with the token itself, as of text 0
    if rows == 1:
        return up_to(ends[0])
    starts = prefix + torch.arange(rows, device=device)[:, None] * stretch
    spans = torch.stack((starts.expand(-1, size), ends + starts - prefix), dim=-1)
    return _joined(prefix.repeat(rows * size), spans.reshape(-1, 1, 2))


def waypoint_visibility(prefix: Tensor, texts: Tensor, first: Tensor, waypoints: int, causal: bool = False) -> Visible:
    """Waypoint tokens of each sample: they see the prefix, their sample's text, and their sample's waypoints.

    Args:
        prefix: Slots that all samples share, integer [1].
        texts: First slot and end of each sample's text, integer [samples, 2].
        first: Slot of the first waypoint, integer [1]; samples follow each other.
        waypoints: Per sample.
        causal: Whether a waypoint sees those in front of it and itself, instead of all.
    """
    samples, device = len(texts), texts.device
    order = torch.arange(1, waypoints + 1, device=device)
    starts = first + torch.arange(samples, device=device)[:, None] * waypoints  # [samples, 1]
    ends = starts + (order if causal else waypoints)
    own = torch.stack((starts.expand(-1, waypoints), ends.expand(-1, waypoints)), dim=-1)
    spans = torch.stack((texts[:, None].expand(-1, waypoints, -1), own), dim=2)  # [samples, waypoints, 2, 2]
    return _joined(prefix.repeat(samples * waypoints), spans.reshape(-1, 2, 2))


def _joined(limits: Tensor, spans: Tensor) -> Visible:
    """Visibility of limits [T] and spans [T, n, 2], of which those that begin where the limit ends become part of it.

    What lies below every limit needs no comparison of slots, so this is work that a kernel is spared.
    """
    first, end = spans.unbind(dim=-1)
    kept = []
    for n in range(spans.shape[1]):
        adjacent = first[:, n] == limits
        limits = torch.where(adjacent, end[:, n].maximum(limits), limits)
        kept.append(spans[:, n].masked_fill(adjacent[:, None], 0))
    return Visible(limits.to(torch.int32), torch.stack(kept, dim=1).to(torch.int32))
