"""What diagnostics show of a pipeline."""

from __future__ import annotations

import time
from dataclasses import dataclass

from flashdrive_node.runtime.frames import FrameAccount, Refusal
from flashdrive_node.runtime.worker import WorkerStatus


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
