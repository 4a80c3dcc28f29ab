"""What goes into an engine and what comes out: the typed border between the node and the networks.

    message -> Observation -> engine -> Prediction -> message

An engine is owned by one thread, which is the only one that touches CUDA. Stamps are integers in nanoseconds of the
ROS clock in use; poses are in metres in the vehicle frame at t0 (x forward, y left, z up).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class EngineError(Exception):
    """An engine could not load, or could not turn one observation into a prediction.

    The process stays usable: after a failed ``step`` the engine has been reset and takes the next observation.
    """


@dataclass(frozen=True)
class CameraFrames:
    """The frames of one camera, oldest first."""

    #: Index of the camera in the model's naming, 0 to 6 (0 front left, 1 front, 2 front right, 6 front telephoto, ...).
    camera_index: int
    #: Header stamps of the frames, nanoseconds, strictly increasing.
    stamps_ns: tuple[int, ...]
    #: RGB images, uint8 [height, width, 3], C-contiguous, one per stamp.
    images: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Observation:
    """One window: what the vehicle saw and did up to t0."""

    #: Increases by one with every observation that the node builds; ties results, records and diagnostics together.
    window_id: int
    #: Time that the prediction starts from, nanoseconds.
    t0_ns: int
    #: In ascending order of camera index.
    cameras: tuple[CameraFrames, ...]
    #: Ego positions at 10 Hz, the last one at t0, in the vehicle frame at t0: float32 [16, 3], metres.
    ego_history_xyz: NDArray[np.float32]
    #: Ego rotations, same times and frame: float32 [16, 3, 3].
    ego_history_rot: NDArray[np.float32]
    #: Navigation instruction such as "Turn right in 42m", or None.
    nav_text: str | None = None


@dataclass(frozen=True)
class ReasoningToken:
    """One generated token of a reasoning."""

    text: str
    #: Whether it was guessed by the drafter and confirmed; the others the model had to find itself.
    routine: bool


@dataclass(frozen=True)
class TrajectorySample:
    """One sampled future. Arrays have one row per waypoint at t0 + 0.1 s, ..., t0 + 6.4 s."""

    #: Positions in the vehicle frame at t0: float32 [64, 3], metres.
    xyz: NDArray[np.float32]
    #: Yaw in the vehicle frame at t0: float32 [64], radians.
    yaw: NDArray[np.float32]
    #: Speed along the path: float32 [64], m/s.
    speed: NDArray[np.float32]
    #: Acceleration held over the step that ends at the waypoint: float32 [64], m/s^2.
    acceleration: NDArray[np.float32]
    #: Curvature held over the step that ends at the waypoint: float32 [64], 1/m (left positive).
    curvature: NDArray[np.float32]
    #: Chain-of-causation text of this sample.
    reasoning: str
    #: False where the text was cut by the length limit or has no end.
    reasoning_complete: bool
    #: The generated tokens with those that end the text, where a drafter guesses; else empty.
    tokens: tuple[ReasoningToken, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """The answer to one observation."""

    window_id: int
    t0_ns: int
    #: Samples as the engine drew them; at least one.
    samples: tuple[TrajectorySample, ...]
    #: Index of the sample to drive.
    chosen: int
    #: Speed at t0 that the engine estimated from the ego history, m/s.
    initial_speed: float
    #: Time spent per stage ("encode", "prefill", "decode", "action", ...), milliseconds.
    timings_ms: dict[str, float] = field(default_factory=dict)
    #: Further figures of this window by name, for example "accept_length" or "flow_error".
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def trajectory(self) -> TrajectorySample:
        """The sample to drive."""
        return self.samples[self.chosen]


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine is, for logs and diagnostics."""

    #: Kind of engine and model, for example "plain alpamayo1_5".
    name: str
    #: Where the weights came from (path and revision), or "none".
    checkpoint: str
    #: SHA-256 over the weights that were read, hexadecimal, or "".
    sha256: str
    device: str
    precision: str
    #: Ego poses per observation.
    history_poses: int
    #: Waypoints per trajectory and their spacing in seconds.
    waypoints: int
    waypoint_dt_s: float
    #: Why "auto" stands for this precision, or "".
    precision_reason: str = ""


#: Called with a fraction in 0..1 and what is being done.
Progress = Callable[[float, str], None]


class Engine(Protocol):
    """Turns observations into predictions. Every method is called from the one thread that owns the engine."""

    def load(self, progress: Progress | None = None) -> EngineInfo:
        """Read the weights onto the device.

        Raises:
            EngineError: The weights could not be loaded; states what was required and found.
        """
        ...

    def warm_up(self, progress: Progress | None = None) -> None:
        """Run every stage once on made-up input, so that the first real window is as fast as the others."""
        ...

    def step(self, observation: Observation) -> Prediction:
        """Answer one observation.

        Raises:
            EngineError: This window has no answer. The engine is reset and usable.
        """
        ...

    def reset(self, reason: str) -> None:
        """Forget everything carried over from earlier windows. Cheap, and allowed at any time after ``load``."""
        ...

    def close(self) -> None:
        """Free the device. ``load`` may be called again afterwards."""
        ...


@runtime_checkable
class TakesFramesAhead(Protocol):
    """What an engine may do besides: take frames of the coming window as they come, so that `step` waits for less."""

    def ingest(self, camera_index: int, stamp_ns: int, image: NDArray[np.uint8]) -> None:
        """Take one frame, between two steps; what no window brings later is forgotten.

        Args:
            camera_index: As in `CameraFrames`.
            stamp_ns: Of the frame, newer than that camera's frames of the last window.
            image: RGB, uint8 [height, width, 3].

        Raises:
            EngineError: The frame cannot be used. The engine is reset and usable.
        """
        ...
