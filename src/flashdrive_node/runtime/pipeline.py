"""Joins buffer, ego history, decoding and worker: messages go in as plain data, deliveries come out of one callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flashdrive_node.engine.protocol import Engine, Observation, Prediction
from flashdrive_node.runtime.checks import CheckRule, Violation
from flashdrive_node.runtime.ego_history import EgoRule, EgoWindow
from flashdrive_node.runtime.frames import FrameAccount, Refusal
from flashdrive_node.runtime.observation import OdometrySample, RawImage
from flashdrive_node.runtime.rig import Rig
from flashdrive_node.runtime.ring_buffer import WindowRule
from flashdrive_node.runtime.worker import OutcomeKind, State, WorkerStatus


@dataclass(frozen=True)
class PipelineSettings:
    """Rules of all parts."""

    window: WindowRule = field(default_factory=WindowRule)
    ego: EgoRule = field(default_factory=EgoRule)
    checks: CheckRule = field(default_factory=CheckRule)
    decode_threads: int = 2
    #: Largest image that is decoded, pixels.
    max_pixels: int = 4096 * 4096
    #: Refuse windows in which a camera shows the same picture in all its frames.
    refuse_frozen: bool = True
    #: A t0 this much later than the one before means that the stream is interrupted: the engine is reset.
    max_t0_gap_s: float = 1.0
    hang_timeout_s: float = 5.0
    reload_after_failures: int = 3


@dataclass(frozen=True, eq=False)
class Delivery:
    """One window that reached the worker, with everything that publishing needs."""

    kind: OutcomeKind
    window_id: int
    t0_ns: int
    prediction: Prediction | None
    #: The observation without which nothing can be said about it; its images are kept only until delivery.
    observation: Observation
    ego: EgoWindow
    #: Stamps that were used, by camera name, oldest first.
    stamps_ns: dict[str, tuple[int, ...]]
    #: Why there is no prediction, for every kind but "result".
    text: str
    #: Monotonic times: last frame of the window received, window chosen, decoded and submitted, step started, ended.
    received_ns: int
    chosen_ns: int
    submitted_ns: int
    started_ns: int
    finished_ns: int


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
    windows_taken: int
    resets: dict[str, int]
    last_reset: str


class Pipeline:
    """Everything between messages and deliveries. Input methods store and return at once; safe from any thread.

    ``on_delivery`` is called from the worker thread (or, for superseded windows, from a decoding one): it must only
    hand over, for example append to a deque and trigger a guard condition.
    """

    def __init__(
        self,
        rig: Rig,
        make_engine: Callable[[], Engine],
        on_delivery: Callable[[Delivery], None],
        settings: PipelineSettings | None = None,
        on_state: Callable[[State], None] | None = None,
    ):
        raise NotImplementedError

    def start(self) -> None:
        """Load and warm the engine up in its thread; returns at once. Frames are stored from now on."""
        raise NotImplementedError

    def set_active(self, active: bool) -> None:
        """Windows are only formed while active; inactive, images are counted and dropped."""
        raise NotImplementedError

    def on_image(self, camera_index: int, image: RawImage, now_ns: int | None = None) -> None:
        """Take one image; ``now_ns`` is the node's clock."""
        raise NotImplementedError

    def refuse_image(self, camera_index: int, text: str) -> None:
        """Count an image that the node could not even convert, and report why."""
        raise NotImplementedError

    def on_odometry(self, sample: OdometrySample) -> None:
        """Take one odometry sample; may complete a window that waited for it."""
        raise NotImplementedError

    def set_navigation(self, text: str | None) -> None:
        """Navigation instruction of the windows from now on."""
        raise NotImplementedError

    def reset(self, reason: str) -> None:
        """Forget frames, history and streaming state; results of earlier windows are discarded."""
        raise NotImplementedError

    def check(self, delivery: Delivery, now_ns: int) -> list[Violation]:
        """Violations of a delivery's prediction at publication time."""
        raise NotImplementedError

    def status(self) -> PipelineStatus:
        """Snapshot for diagnostics."""
        raise NotImplementedError

    def close(self, timeout_s: float = 10.0) -> bool:
        """End all threads; False where the engine's thread did not end in time."""
        raise NotImplementedError
