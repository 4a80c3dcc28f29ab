"""What diagnostics show of a pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from flashdrive_node.runtime.frames import DropCause, FrameAccount, Refusal
from flashdrive_node.runtime.outcome import WorkerStatus


@dataclass
class InputNotes:
    """Last sign of life and last complaint of one input; times are monotonic."""

    received_ns: int | None = None
    error: str = ""
    error_ns: int = 0

    def complain(self, text: str) -> None:
        """Remember why something was refused."""
        self.error, self.error_ns = text, time.monotonic_ns()

    def silent_s(self) -> float | None:
        """Seconds since the last accepted message; None before the first."""
        return None if self.received_ns is None else (time.monotonic_ns() - self.received_ns) / 1e9

    def error_age_s(self) -> float:
        """Seconds since the last complaint; infinite where there was none."""
        return (time.monotonic_ns() - self.error_ns) / 1e9 if self.error else float("inf")


@dataclass(frozen=True)
class CameraStatus:
    """One camera for diagnostics."""

    name: str
    index: int
    account: FrameAccount
    #: Measured over the last frames; 0 where unknown.
    rate_hz: float
    #: Since the last accepted frame, monotonic; None before the first.
    silent_s: float | None
    frozen: bool
    #: Last reason for which an image was refused, with its monotonic age; "" where none.
    last_error: str
    last_error_age_s: float


@dataclass(frozen=True)
class PipelineStatus:
    """Snapshot for diagnostics."""

    cameras: tuple[CameraStatus, ...]
    #: Why there is no newer window right now; None while windows flow.
    refusal: Refusal | None
    worker: WorkerStatus
    odometry_received: int
    odometry_dropped: dict[str, int]
    odometry_silent_s: float | None
    odometry_last_error: str
    odometry_last_error_age_s: float
    windows_taken: int
    resets: dict[str, int]
    last_reset: str


def silent_input(cameras: Iterable[CameraStatus], odometry: InputNotes) -> Refusal | None:
    """The input that has sent nothing for a second of wall time: without messages nobody else would notice."""
    for camera in cameras:
        if camera.silent_s is not None and camera.silent_s > 1.0:
            text = f"camera {camera.name} has been silent for {camera.silent_s:.1f} s"
            return Refusal("silent", text, camera.name)
    silent_s = odometry.silent_s()
    if silent_s is not None and silent_s > 1.0:
        return Refusal("odometry_silent", f"odometry has been silent for {silent_s:.1f} s")
    return None


def drop_complaint(cause: DropCause | None, stamp_ns: int, now_ns: int | None) -> str:
    """Why an image was not stored, in words."""
    text = f"image at {stamp_ns / 1e9:.3f} s dropped: {cause}"
    if now_ns is not None and cause in ("stale", "future"):
        text += (
            f", {abs(now_ns - stamp_ns) / 1e9:.1f} s {'behind' if cause == 'stale' else 'ahead of'} the node's clock"
        )
        text += " (is use_sim_time set right?)"
    return text
