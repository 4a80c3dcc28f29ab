"""Frames of the coming window that the engine may take before the window is complete: which, and in what order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.engine.protocol import Observation


@dataclass(frozen=True, eq=False)
class FrameAhead:
    """A decoded frame, as `TakesFramesAhead.ingest` takes it."""

    camera_index: int
    stamp_ns: int
    image: NDArray[np.uint8]
    #: Resets of the worker before it came.
    epoch: int


class FramesAhead:
    """The newest frame of each camera that no window has brought yet. The caller sees to it that one thread is here.

    Ahead of a window one frame of each camera is given out: what comes next belongs to the window after, whose frames
    the engine is to see behind the window before.
    """

    def __init__(self) -> None:
        # In order of arrival.
        self._waiting: dict[int, FrameAhead] = {}
        self._given: set[int] = set()
        # Newest stamp of each camera in the last window.
        self._newest_ns: dict[int, int] = {}

    def add(self, frame: FrameAhead) -> bool:
        """Keep a frame in place of its camera's older one; False where a newer one, or a window with it, has come."""
        waiting = self._waiting.get(frame.camera_index)
        newest_ns = self._newest_ns.get(frame.camera_index)
        if (waiting and waiting.stamp_ns >= frame.stamp_ns) or (newest_ns is not None and newest_ns >= frame.stamp_ns):
            return False
        self._waiting[frame.camera_index] = frame
        return True

    def pending(self) -> bool:
        """Whether there is a frame to give out."""
        return not self._waiting.keys() <= self._given

    def pop(self) -> FrameAhead:
        """The frame that has waited for longest of those to give out."""
        camera = next(index for index in self._waiting if index not in self._given)
        self._given.add(camera)
        return self._waiting.pop(camera)

    def expect(self, observation: Observation) -> None:
        """A window is there: its frames, and older ones, come with it."""
        self._newest_ns = {camera.camera_index: camera.stamps_ns[-1] for camera in observation.cameras}
        for index, stamp_ns in self._newest_ns.items():
            if index in self._waiting and self._waiting[index].stamp_ns <= stamp_ns:
                del self._waiting[index]

    def begin(self) -> None:
        """The engine begins with a window: frames that wait then are of the next."""
        self._given.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._given.clear()
        self._newest_ns.clear()
