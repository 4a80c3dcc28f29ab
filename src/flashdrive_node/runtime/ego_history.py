"""Odometry store, and the ego history that ends exactly at t0, whatever the odometry rate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.runtime.observation import OdometrySample
from flashdrive_node.runtime.ring_buffer import Refusal


@dataclass(frozen=True)
class EgoRule:
    """What a history must satisfy."""

    poses: int = 16
    interval_s: float = 0.1
    #: Longest time between two odometry samples of the span.
    max_gap_s: float = 0.25
    #: How far t0 may lie after the newest sample; bridged with the twist. 0 waits for the next sample.
    max_extrapolation_s: float = 0.0
    #: Faster motion between two samples is a teleport.
    max_speed_mps: float = 70.0
    #: Largest difference between the speed that the poses imply and the twist, plus 30 % of the speed; inf: unchecked.
    twist_tolerance_mps: float = 3.0
    #: A stamp this far behind the newest one is a clock jump.
    jump_back_s: float = 1.0


@dataclass(frozen=True, eq=False)
class EgoWindow:
    """The motion up to t0."""

    t0_ns: int
    #: float32 [16, 3], metres in the vehicle frame at t0, oldest first, the last one zero.
    xyz: NDArray[np.float32]
    #: float32 [16, 3, 3], same times and frame, the last one the identity.
    rot: NDArray[np.float32]
    #: Pose of the vehicle at t0 in ``frame_id``: metres and quaternion x, y, z, w.
    position: NDArray[np.float64]
    orientation_xyzw: NDArray[np.float64]
    frame_id: str
    child_frame_id: str
    #: Forward speed at t0 by the twist, and by the poses of the last 0.1 s; m/s.
    speed_twist: float
    speed_implied: float
    #: How far t0 lies after the newest sample that was used, seconds; 0 where interpolated.
    extrapolated_s: float


class EgoHistory:
    """Bounded store of odometry. Safe to call from any thread."""

    #: Samples received, and dropped by cause ("equal_stamp", "backwards", "not_finite", "not_unit_quaternion",
    #: "wrong_child_frame", "frame_change" counts resets of the store).
    received: int
    dropped: dict[str, int]

    def __init__(self, rule: EgoRule | None = None, base_frame: str | None = None):
        raise NotImplementedError

    def insert(self, sample: OdometrySample) -> Refusal | None:
        """Store one sample; returns why it was not stored, or what is conspicuous about it ("clock_jump").

        A sample whose reason is "clock_jump" is not stored: the caller resets everything and inserts it again.
        """
        raise NotImplementedError

    def newest_usable_ns(self) -> int | None:
        """Latest t0 that the stored samples (and the allowed extrapolation) reach; None without samples."""
        raise NotImplementedError

    def history_at(self, t0_ns: int) -> EgoWindow | Refusal:
        """History that ends at t0, in the vehicle frame at t0.

        Refusals: "odometry_missing", "odometry_wait" (t0 is newer than the newest sample: try again when the next one
        arrives), "odometry_span", "odometry_gap", "odometry_teleport", "odometry_twist".
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all samples; counters stay."""
        raise NotImplementedError
