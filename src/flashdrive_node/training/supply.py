"""Where fresh training samples come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from flashdrive_node.training.pictures import Photographer
from flashdrive_node.training.replay_buffer import Batch, Scribe
from flashdrive_node.training.source import WindowSource
from flashdrive_node.training.windows import Windows, join


class Fresh(NamedTuple):
    """New samples."""

    samples: Batch
    #: How many they count for: the same on all ranks, which must take equally many steps.
    nominal: int


class Supply(Protocol):
    """Makes samples without end."""

    def __call__(self) -> Fresh:
        """Some new samples, on the device that trains."""
        ...


class DriveSupply:
    """Windows of drives that processes compute, rendered here, some at a time."""

    def __init__(self, source: WindowSource, photographer: Photographer, scribe: Scribe):
        self.source, self.photographer, self.scribe = source, photographer, scribe
        self._rest: Windows | None = None
        self._used = 0

    def __call__(self) -> Fresh:
        """See `Supply`."""
        windows = self._take(self.photographer.batch)
        return Fresh(self.scribe.write(windows, self.photographer.shoot(windows)), len(windows))

    def _take(self, count: int) -> Windows:
        while self._rest is None or len(self._rest) < self._used + count:
            more = next(self.source).to(self.scribe.layout.device)
            left = None if self._rest is None else self._rest.span(self._used, len(self._rest))
            self._rest, self._used = more if left is None else join(left, more), 0
        self._used += count
        return self._rest.span(self._used - count, self._used)


class MixedSupply:
    """Several supplies in turn, so that each gives about its share of the samples."""

    def __init__(self, parts: Sequence[tuple[Supply, float]]):
        """Keep the supplies with their shares."""
        self.parts = list(parts)
        self._given = [0.0] * len(self.parts)

    def __call__(self) -> Fresh:
        """Samples of the supply that is furthest behind its share."""
        behind = [given / share for given, (_, share) in zip(self._given, self.parts, strict=True)]
        chosen = behind.index(min(behind))
        fresh = self.parts[chosen][0]()
        self._given[chosen] += fresh.nominal
        return fresh
