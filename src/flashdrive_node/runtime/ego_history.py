"""Odometry store, and the ego history that ends exactly at t0, whatever the odometry rate."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.runtime.frames import Refusal
from flashdrive_node.runtime.observation import OdometrySample
from flashdrive_node.runtime.rotation import (
    matrix_from_quaternion,
    multiply,
    quaternion_from_rotation_vector,
    slerp,
)

#: Rows of the store; the newest half survives when it is full (5 s at 400 Hz).
_CAPACITY = 4096
#: Columns of a row: position, quaternion, linear and angular velocity.
_P, _Q, _V, _W = slice(0, 3), slice(3, 7), slice(7, 10), slice(10, 13)


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
    #: Samples older (newer) than the node's clock by more than this are dropped as stale (future).
    max_age_s: float = 2.0
    max_ahead_s: float = 0.5


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
    """Bounded store of odometry. Safe to call from any thread.

    Counters: ``received`` samples, of which ``dropped`` by cause: "stale", "future", "equal_stamp", "backwards",
    "not_finite", "not_unit_quaternion", "wrong_child_frame".
    """

    def __init__(self, rule: EgoRule | None = None, base_frame: str | None = None):
        self.rule = rule or EgoRule()
        self.base_frame = base_frame
        self.received = 0
        self.dropped: Counter[str] = Counter()
        self._stamps = np.empty(_CAPACITY, np.int64)
        self._rows = np.empty((_CAPACITY, 13), np.float64)
        self._count = 0
        self._frame_id = ""
        self._child_frame_id = ""
        self._lock = Lock()
        self._interval_ns = round(self.rule.interval_s * 1e9)

    def insert(self, sample: OdometrySample, now_ns: int | None = None) -> Refusal | None:
        """Store one sample; returns why it was not stored, or what is conspicuous about it.

        ``now_ns`` is the node's clock; without it stamps are not compared with the clock.
        Reasons: the causes of ``dropped``; "clock_jump" (not stored and not counted: the caller resets everything and
        inserts it again); "frame_change" (stored; what was there before is forgotten).
        """
        row = np.array(
            [*sample.position, *sample.orientation_xyzw, *sample.linear_velocity, *sample.angular_velocity], np.float64
        )
        with self._lock:
            newest_ns = int(self._stamps[self._count - 1]) if self._count else None
            behind_s = 0.0 if newest_ns is None else (newest_ns - sample.stamp_ns) / 1e9
            if now_ns is not None and (foreign := self._foreign_stamp(sample.stamp_ns, now_ns)) is not None:
                # One sample with a wild stamp must not look like a jump of the clock.
                self.received += 1
                self.dropped[foreign.reason] += 1
                return foreign
            if now_ns is None and behind_s > self.rule.jump_back_s:
                return Refusal("clock_jump", f"odometry stamp went back by {behind_s:.3f} s")
            self.received += 1
            refusal = self._fault(sample, row, behind_s, newest_ns)
            if refusal is not None:
                self.dropped[refusal.reason] += 1
                return refusal
            if self._count and sample.frame_id != self._frame_id:
                refusal = Refusal(
                    "frame_change", f"odometry frame changed from {self._frame_id!r} to {sample.frame_id!r}"
                )
                self._count = 0
            if self._count == _CAPACITY:
                half = _CAPACITY // 2
                self._stamps[:half] = self._stamps[half:].copy()
                self._rows[:half] = self._rows[half:].copy()
                self._count = half
            row[_Q] /= np.linalg.norm(row[_Q])
            self._stamps[self._count] = sample.stamp_ns
            self._rows[self._count] = row
            self._count += 1
            self._frame_id, self._child_frame_id = sample.frame_id, sample.child_frame_id
            return refusal

    def newest_usable_ns(self) -> int | None:
        """Latest t0 that the stored samples (and the allowed extrapolation) reach; None without samples."""
        with self._lock:
            if not self._count:
                return None
            return int(self._stamps[self._count - 1]) + round(self.rule.max_extrapolation_s * 1e9)

    def history_at(self, t0_ns: int) -> EgoWindow | Refusal:
        """History that ends at t0, in the vehicle frame at t0.

        Refusals: "odometry_missing", "odometry_wait" (t0 is newer than the newest sample: try again when the next one
        arrives), "odometry_span", "odometry_gap", "odometry_teleport", "odometry_twist".
        """
        rule = self.rule
        times = t0_ns - self._interval_ns * np.arange(rule.poses - 1, -1, -1, dtype=np.int64)
        with self._lock:
            if not self._count:
                return Refusal("odometry_missing", "no odometry received")
            stamps = self._stamps[: self._count]
            beyond_s = (t0_ns - int(stamps[-1])) / 1e9
            if beyond_s > rule.max_extrapolation_s:
                return Refusal("odometry_wait", f"newest odometry is {beyond_s * 1e3:.0f} ms older than t0")
            if stamps[0] > times[0]:
                has_s, needs_s = (t0_ns - int(stamps[0])) / 1e9, (rule.poses - 1) * rule.interval_s
                return Refusal(
                    "odometry_span", f"odometry must reach {needs_s:.1f} s back from t0, it reaches {has_s:.2f} s"
                )
            first = int(np.searchsorted(stamps, times[0], "right")) - 1
            last = min(int(np.searchsorted(stamps, t0_ns, "left")), self._count - 1)
            stamps = stamps[first : last + 1].copy()
            rows = self._rows[first : last + 1].copy()
            frames = self._frame_id, self._child_frame_id
        fault = self._gap_or_teleport(stamps, rows)
        if fault is not None:
            return fault
        poses = _interpolate(stamps, rows, times)
        xyz, rot = _in_last_frame(poses)
        body_velocity = np.einsum("nji,nj->ni", rot[:-1], np.diff(xyz, axis=0)) / rule.interval_s
        twist = (poses[:-1, _V] + poses[1:, _V]) / 2
        fault = self._twist_mismatch(body_velocity, twist, times)
        if fault is not None:
            return fault
        return EgoWindow(
            t0_ns=t0_ns,
            xyz=xyz.astype(np.float32),
            rot=rot.astype(np.float32),
            position=poses[-1, _P].copy(),
            orientation_xyzw=poses[-1, _Q].copy(),
            frame_id=frames[0],
            child_frame_id=frames[1],
            speed_twist=float(poses[-1, _V][0]),
            speed_implied=float(-xyz[-2, 0] / rule.interval_s) if rule.poses > 1 else 0.0,
            extrapolated_s=max(beyond_s, 0.0),
        )

    def reset(self) -> None:
        """Forget all samples; counters stay."""
        with self._lock:
            self._count = 0

    def _foreign_stamp(self, stamp_ns: int, now_ns: int) -> Refusal | None:
        age_s = (now_ns - stamp_ns) / 1e9
        if -self.rule.max_ahead_s <= age_s <= self.rule.max_age_s:
            return None
        where = f"{age_s:.1f} s behind" if age_s > 0 else f"{-age_s:.1f} s ahead of"
        return Refusal(
            "stale" if age_s > 0 else "future",
            f"odometry at {stamp_ns / 1e9:.3f} s dropped: {where} the node's clock (is use_sim_time set right?)",
        )

    def _fault(
        self, sample: OdometrySample, row: NDArray[np.float64], behind_s: float, newest_ns: int | None
    ) -> Refusal | None:
        if not np.isfinite(row).all():
            return Refusal("not_finite", f"odometry at {sample.stamp_ns / 1e9:.3f} s has a value that is not finite")
        norm = float(np.linalg.norm(row[_Q]))
        if abs(norm - 1) > 0.01:
            return Refusal("not_unit_quaternion", f"odometry orientation must have norm 1, found {norm:.4f}")
        if self.base_frame is not None and sample.child_frame_id != self.base_frame:
            return Refusal(
                "wrong_child_frame",
                f"odometry must be of frame {self.base_frame!r} (child_frame_id), found {sample.child_frame_id!r}",
            )
        if newest_ns is not None and behind_s == 0:
            return Refusal("equal_stamp", f"odometry repeats the stamp {sample.stamp_ns / 1e9:.3f} s")
        if behind_s > 0:
            return Refusal("backwards", f"odometry stamp lies {behind_s * 1e3:.1f} ms before the newest one")
        return None

    def _gap_or_teleport(self, stamps: NDArray[np.int64], rows: NDArray[np.float64]) -> Refusal | None:
        steps_s = np.diff(stamps) / 1e9
        if not len(steps_s):
            return None
        widest = int(np.argmax(steps_s))
        if steps_s[widest] > self.rule.max_gap_s:
            return Refusal(
                "odometry_gap",
                f"odometry has a gap of {steps_s[widest]:.2f} s (at most {self.rule.max_gap_s:.2f} s) after "
                f"{stamps[widest] / 1e9:.3f} s",
            )
        distance = np.linalg.norm(np.diff(rows[:, _P], axis=0), axis=1)
        # Half a metre is granted: pose corrections of a localizer are not teleports, however short the step.
        excess = distance - self.rule.max_speed_mps * steps_s - 0.5
        worst = int(np.argmax(excess))
        if excess[worst] > 0:
            return Refusal(
                "odometry_teleport",
                f"odometry moved {distance[worst]:.1f} m within {steps_s[worst] * 1e3:.0f} ms at "
                f"{stamps[worst + 1] / 1e9:.3f} s (at most {self.rule.max_speed_mps:.0f} m/s)",
            )
        return None

    def _twist_mismatch(
        self, implied: NDArray[np.float64], twist: NDArray[np.float64], times: NDArray[np.int64]
    ) -> Refusal | None:
        difference = np.linalg.norm(implied - twist, axis=1)
        allowed = self.rule.twist_tolerance_mps + 0.3 * np.linalg.norm(twist, axis=1)
        excess = difference - allowed
        worst = int(np.argmax(excess)) if len(excess) else 0
        if not len(excess) or excess[worst] <= 0:
            return None
        return Refusal(
            "odometry_twist",
            f"poses imply {_speeds(implied[worst])} m/s (x, y, z) in the vehicle frame, the twist says "
            f"{_speeds(twist[worst])} at {times[worst + 1] / 1e9:.3f} s",
        )


def _speeds(velocity: NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in velocity) + ")"


def _interpolate(stamps: NDArray[np.int64], rows: NDArray[np.float64], times: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows [T, 13] at ``times`` [T]: position and twist linear, rotation slerp; after the last stamp by its twist."""
    right = np.clip(np.searchsorted(stamps, times, "left"), 1, max(len(stamps) - 1, 1))
    if len(stamps) == 1:
        right = np.zeros_like(right)
    left = np.maximum(right - 1, 0)
    # Differences first: nanoseconds of today do not fit into a double.
    width = np.maximum(stamps[right] - stamps[left], 1)
    fraction = np.clip((times - stamps[left]) / width, 0.0, 1.0)
    a, b = rows[left], rows[right]
    out = a + fraction[:, None] * (b - a)
    out[:, _Q] = slerp(a[:, _Q], b[:, _Q], fraction)
    beyond_s = np.maximum(times - stamps[-1], 0) / 1e9
    late = beyond_s > 0
    if late.any():
        turn = quaternion_from_rotation_vector(out[late, _W] * beyond_s[late, None])
        half_turn = quaternion_from_rotation_vector(out[late, _W] * beyond_s[late, None] / 2)
        heading = matrix_from_quaternion(multiply(out[late, _Q], half_turn))
        out[late, _P] += np.einsum("nij,nj->ni", heading, out[late, _V]) * beyond_s[late, None]
        out[late, _Q] = multiply(out[late, _Q], turn)
    return out


def _in_last_frame(poses: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions [T, 3] and rotations [T, 3, 3] seen from the last pose; that one is exactly zero and identity."""
    rotations = matrix_from_quaternion(poses[:, _Q])
    xyz = (poses[:, _P] - poses[-1, _P]) @ rotations[-1]
    rot = np.einsum("ji,njk->nik", rotations[-1], rotations)
    rot[-1] = np.eye(3)
    return xyz, rot
