"""Per camera a time-ordered store of frames, and the choice of the frames that belong to one t0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.runtime.observation import RawImage
from flashdrive_node.runtime.rig import Rig

#: Why a frame was never used: it was inserted twice / older than what is kept / too far from the node's clock / chosen
#: but its window was overtaken / never chosen (cameras faster than the windows) / undecodable / reset / node inactive.
DropCause = Literal[
    "duplicate", "late", "stale", "future", "superseded", "not_needed", "corrupt", "invalid", "reset", "inactive"
]


@dataclass(frozen=True)
class WindowRule:
    """How frames are chosen."""

    frames: int = 4
    #: Time between the frames of one camera.
    interval_s: float = 0.1
    #: Largest distance of a frame from its nominal time; at most half the interval.
    tolerance_s: float = 0.05
    #: Shortest time between successive t0 (nominal: half a period of the reference camera is granted for jitter).
    min_period_s: float = 0.1
    #: Frames older (newer) than the node's clock by more than this are dropped as stale (future).
    max_age_s: float = 2.0
    max_ahead_s: float = 0.5
    #: A stamp this far behind the newest one of its camera is a clock jump instead of a reordered frame.
    jump_back_s: float = 1.0


@dataclass(eq=False)
class Frame:
    """One stored image and what became of it."""

    camera_index: int
    stamp_ns: int
    received_ns: int
    #: The bytes, until they are decoded.
    raw: RawImage | None
    #: RGB uint8 [H, W, 3] once decoded.
    pixels: NDArray[np.uint8] | None = None
    #: CRC of the bytes once decoded: equal in successive frames where a camera repeats its picture.
    signature: int | None = None
    #: Why it cannot be decoded.
    error: str | None = None


@dataclass(frozen=True, eq=False)
class CameraWindow:
    """The chosen frames of one camera, oldest first."""

    index: int
    name: str
    frames: tuple[Frame, ...]

    @property
    def stamps_ns(self) -> tuple[int, ...]:
        """Header stamps of the frames."""
        return tuple(frame.stamp_ns for frame in self.frames)


@dataclass(frozen=True, eq=False)
class FrameWindow:
    """A complete set: ``frames`` of every camera around t0, t0 - 0.1 s, ..."""

    t0_ns: int
    #: In ascending order of camera index.
    cameras: tuple[CameraWindow, ...]
    #: Largest distance between the newest frames of two cameras.
    skew_ns: int
    #: Largest distance of any frame from its nominal time.
    offset_ns: int

    @property
    def received_ns(self) -> int:
        """Monotonic time when the last of its frames arrived."""
        return max(frame.received_ns for camera in self.cameras for frame in camera.frames)


@dataclass(frozen=True)
class Refusal:
    """Why there is no window, for diagnostics."""

    #: "waiting", "no_frames", "silent", "missing_frame", "corrupt", or of the ego history (see ``EgoHistory``).
    reason: str
    text: str
    camera: str | None = None


@dataclass
class FrameAccount:
    """Where the frames of one camera went: received = used + dropped + held."""

    received: int = 0
    used: int = 0
    #: Still stored, or in a window that is under way.
    held: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Insertion:
    """What became of an inserted frame."""

    #: The stored frame; None where it was dropped.
    frame: Frame | None
    dropped: DropCause | None = None
    #: Seconds that the stamp lies behind the newest one of its camera, where that is a clock jump; the caller resets
    #: everything and inserts the frame again.
    jumped_back_s: float | None = None


class RingBuffer:
    """Frames of all cameras of a rig. Safe to call from any thread.

    t0 is the stamp of a frame of the rig's reference camera. A window is complete where every camera has, for each of
    t0, t0 - interval, ..., a frame within the tolerance; the nearest is taken (the older of two equally near), and no
    frame serves two times. A camera whose newest frame is older than t0 by more than half its period is waited for,
    because its next frame will be nearer.
    """

    def __init__(self, rig: Rig, rule: WindowRule | None = None):
        raise NotImplementedError

    def insert(self, camera_index: int, image: RawImage, now_ns: int | None = None) -> Insertion:
        """Store one image. ``now_ns`` is the node's (ROS) clock; without it stamps are not compared with the clock."""
        raise NotImplementedError

    def newest_window(self, limit_ns: int | None = None, now_ns: int | None = None) -> FrameWindow | Refusal:
        """The newest complete window with t0 <= ``limit_ns``, newer than every one taken; changes nothing."""
        raise NotImplementedError

    def take(self, window: FrameWindow) -> None:
        """Claim a window: its t0 and older ones are not offered again. Every taken window must be resolved once."""
        raise NotImplementedError

    def resolve(self, window: FrameWindow, used: bool) -> None:
        """Say whether a taken window reached the engine, so that its frames can be accounted for."""
        raise NotImplementedError

    def wanted(self, frame: Frame) -> bool:
        """Whether the next windows will probably need this frame, so that it is worth decoding ahead."""
        raise NotImplementedError

    def count_drop(self, camera_index: int, cause: DropCause) -> None:
        """Account for an image that was received but refused before it came here (inactive node, wrong size, ...)."""
        raise NotImplementedError

    def reset(self) -> None:
        """Drop all frames (cause "reset") and forget the last t0."""
        raise NotImplementedError

    def accounts(self) -> dict[int, FrameAccount]:
        """Copy of the account of every camera by index."""
        raise NotImplementedError
