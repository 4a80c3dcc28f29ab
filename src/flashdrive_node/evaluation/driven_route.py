"""Where a vehicle was, from the odometry of a whole recording: the ground truth of open-loop scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.evaluation.clip import FUTURE_DT_S, FUTURE_POINTS, Truth
from flashdrive_node.model.errors import InputError
from flashdrive_node.runtime.observation import OdometrySample
from flashdrive_node.runtime.rotation import matrix_from_quaternion, slerp

_AHEAD_NS = np.round(np.arange(FUTURE_POINTS + 1) * FUTURE_DT_S * 1e9).astype(np.int64)


class DrivenRoute:
    """Poses in order of time, whatever order they were recorded in."""

    def __init__(self, samples: Sequence[OdometrySample], max_gap_s: float = 0.25):
        """`max_gap_s` is the longest time between two samples that is bridged.

        Raises:
            InputError: No sample.
        """
        if not samples:
            raise InputError("odometry is required, found none")
        ordered = sorted({s.stamp_ns: s for s in samples}.values(), key=lambda s: s.stamp_ns)
        self.max_gap_s = max_gap_s
        self.stamps_ns = np.array([s.stamp_ns for s in ordered], np.int64)
        self._position = np.array([s.position for s in ordered], np.float64)
        self._orientation = np.array([s.orientation_xyzw for s in ordered], np.float64)
        self._frames = np.array([s.frame_id for s in ordered])

    @property
    def end_ns(self) -> int:
        """Time of the last pose."""
        return int(self.stamps_ns[-1])

    def future(self, t0_ns: int) -> Truth | None:
        """What was driven after t0; None where poses are missing, not finite or in another frame in between."""
        times = t0_ns + _AHEAD_NS
        stamps = self.stamps_ns
        if times[0] < stamps[0] or times[-1] > stamps[-1]:
            return None
        first = int(np.searchsorted(stamps, times[0], "right")) - 1
        last = int(np.searchsorted(stamps, times[-1], "left"))
        used = slice(first, last + 1)
        if (np.diff(stamps[used]) > self.max_gap_s * 1e9).any() or len(set(self._frames[used])) > 1:
            return None
        xyz, rot = self._at(times)
        if not (np.isfinite(xyz).all() and np.isfinite(rot).all()):
            return None
        xyz, rot = (xyz[1:] - xyz[0]) @ rot[0], rot[0].T @ rot[1:]
        yaw = np.unwrap(np.arctan2(rot[:, 1, 0], rot[:, 0, 0]))
        return Truth(xyz.astype(np.float32), yaw.astype(np.float32))

    def _at(self, times_ns: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Positions [T, 3] and rotations [T, 3, 3] at times within the recording."""
        right = np.clip(np.searchsorted(self.stamps_ns, times_ns, "left"), 1, len(self.stamps_ns) - 1)
        left = right - 1
        # Differences first: nanoseconds of today do not fit into a double.
        width = self.stamps_ns[right] - self.stamps_ns[left]
        fraction = (times_ns - self.stamps_ns[left]) / width
        a, b = self._position[left], self._position[right]
        turned = slerp(self._orientation[left], self._orientation[right], fraction)
        return a + fraction[:, None] * (b - a), matrix_from_quaternion(turned)
