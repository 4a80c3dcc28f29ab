"""Recorded or simulated drives as windows for an engine, with what was driven afterwards kept apart.

An engine is given a window's `Observation` and nothing else; `Truth` stays with the scores. Sources give their clips
one after the other, and a clip its windows one after the other, made when they are asked for: a clip that is not
looked at costs next to nothing, and a long recording is never in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.engine.protocol import Observation
from flashdrive_node.model.errors import InputError

#: Windows of a clip, and the time of the first from the clip's start: the protocol of the published figures, for
#: clips of 20 s (the last window, at 13.6 s, has 6.4 s of future).
PROTOCOL_WINDOWS, PROTOCOL_START_S = 120, 1.7
#: Points of a driven path, and their spacing in seconds.
FUTURE_POINTS, FUTURE_DT_S = 64, 0.1


class ClipError(Exception):
    """A clip cannot be read, or not any further."""


@dataclass(frozen=True, eq=False)
class Truth:
    """What was driven after t0. Never part of an observation."""

    #: Positions at t0 + 0.1 s, ..., t0 + 6.4 s in the vehicle frame at t0: float32 [64, 3], metres.
    xyz: NDArray[np.float32]
    #: Headings at the same times in that frame, float32 [64], radians.
    yaw: NDArray[np.float32]
    #: The sentence that gives the driver's reason, where it is known.
    sentence: str | None = None


@dataclass(frozen=True, eq=False)
class Window:
    """One moment of a clip."""

    observation: Observation
    #: None where the recording does not say: the window is answered, because a stream must not have holes, and its
    #: path is not scored.
    truth: Truth | None


@dataclass(eq=False)
class Clip:
    """Consecutive windows of one drive."""

    #: Unique in its source; also the name of its result file.
    name: str
    #: One pass. What goes wrong on the way is raised here, as a `ClipError`.
    windows: Iterator[Window]
    #: What a reader should know, such as frames that could not be decoded; grows while windows are taken.
    notes: list[str] = field(default_factory=list)
    #: Makes every so-manieth window alone, where that is cheaper than to make all of them.
    thinned: Callable[[int], Iterator[Window]] | None = None

    def every(self, stride: int) -> Iterator[Window]:
        """Every so-manieth window from the first on, in place of `windows`."""
        return self.thinned(stride) if self.thinned is not None else islice(self.windows, 0, None, stride)


class ClipSource(Protocol):
    """Where clips come from."""

    #: For reports, for example "world test:0-199".
    name: str
    #: Cameras of every window, ascending.
    camera_indices: tuple[int, ...]

    def clips(self) -> Iterator[Clip]:
        """All clips in a fixed order. Taking the next one ends the last, used up or not."""
        ...

    def __len__(self) -> int:
        """Number of clips, or 0 where it is not known beforehand."""
        ...


def parse_range(text: str, option: str) -> range:
    """Indices from ``"17"`` or ``"0-199"``, both ends included.

    Raises:
        InputError: The text is nothing of the kind.
    """
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
        raise InputError(f"{option}: indices such as 17 or 0-199 are required, found {text!r}")
    return range(int(first), int(last or first) + 1)
