"""One stored image and what becomes of it; a complete set of them; and why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.runtime.observation import RawImage

#: Why a frame was never used: it was inserted twice / older than what is kept / too far from the node's clock / chosen
#: but its window was overtaken / chosen but its window was refused for another frame's fault / never chosen (cameras
#: faster than the windows) / undecodable / reset / node inactive.
DropCause = Literal[
    "duplicate",
    "late",
    "stale",
    "future",
    "superseded",
    "refused",
    "not_needed",
    "corrupt",
    "invalid",
    "reset",
    "inactive",
]


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
    #: Of the decoding pool: whether it was given the frame, whether it is done with it, and who waits for that.
    scheduled: bool = False
    finished: bool = False
    waiting: list[tuple[Callable[[], bool], Callable[[], None]]] = field(default_factory=list)
    #: Windows under way that hold it; why it is lost if it is removed now; whether it reached the engine; was removed.
    pending: int = 0
    lost: DropCause = "not_needed"
    used: bool = False
    evicted: bool = False


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

    @property
    def frozen(self) -> bool:
        """Whether all (decoded) frames carry the same bytes."""
        signatures = {frame.signature for frame in self.frames}
        return len(self.frames) > 1 and len(signatures) == 1 and None not in signatures


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
        return max(frame.received_ns for frame in self.frames)

    @property
    def frames(self) -> list[Frame]:
        """All frames of all cameras."""
        return [frame for camera in self.cameras for frame in camera.frames]


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
    #: Of those received, how many had a stamp that is not after the newest one before it.
    non_increasing: int = 0


@dataclass(frozen=True)
class Insertion:
    """What became of an inserted frame."""

    #: The stored frame; None where it was dropped.
    frame: Frame | None
    dropped: DropCause | None = None
    #: Seconds that the stamp lies behind the newest one of its camera, where that is a clock jump; the caller resets
    #: everything and inserts the frame again.
    jumped_back_s: float | None = None
    #: How many frames in a row, with this one, had a stamp that is not after the newest one.
    disorder: int = 0
