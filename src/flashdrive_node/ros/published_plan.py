"""What stands in ``~/output/trajectory``, whichever message type carries it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from geometry_msgs.msg import Quaternion
from numpy.typing import NDArray

from flashdrive_node.ros.messages import stamp_ns

Floats = NDArray[np.float64]


class PlanError(ValueError):
    """A published trajectory that cannot be driven; says what was required and found."""


@dataclass(frozen=True)
class PublishedPlan:
    """P points of one published trajectory, in the frame that its header names."""

    #: The time that it was planned for, nanoseconds.
    t0_ns: int
    frame_id: str
    #: Times after t0 [P], seconds.
    after_s: Floats
    #: [P, 2], metres; headings [P], radians, unwrapped; speeds [P], m/s.
    xy: Floats
    yaw: Floats
    speed: Floats

    def seen_from(self, base_frame: str, odometry_frame: str, pose: tuple[float, float, float]) -> PublishedPlan:
        """The same in the vehicle's frame at t0.

        Args:
            base_frame: Name of the vehicle's frame.
            odometry_frame: Name of the frame that the odometry is given in.
            pose: x, y (metres) and yaw (radians) of the vehicle at t0 in the odometry's frame.

        Raises:
            PlanError: It is given in neither of the two frames.
        """
        if self.frame_id == base_frame:
            return self
        if self.frame_id != odometry_frame:
            raise PlanError(
                f"a trajectory in frame {base_frame!r} or {odometry_frame!r} is required, found {self.frame_id!r}"
            )
        x, y, yaw = pose
        cos, sin = math.cos(yaw), math.sin(yaw)
        xy = (self.xy - np.array([x, y])) @ np.array([[cos, -sin], [sin, cos]])
        # Headings of a vehicle within 6.4 s: the first one decides which turn is meant.
        heading = self.yaw - yaw
        heading -= 2 * math.pi * round(float(heading[0]) / (2 * math.pi))
        return PublishedPlan(self.t0_ns, base_frame, self.after_s, xy, heading, self.speed)


def read_plan(message: Any) -> PublishedPlan:
    """Points of a trajectory_msgs/MultiDOFJointTrajectory or an autoware_planning_msgs/Trajectory.

    Raises:
        PlanError: It has no points.
    """
    if not message.points:
        raise PlanError(f"a trajectory with points is required, found none (stamp {stamp_ns(message.header.stamp)} ns)")
    standard = hasattr(message, "joint_names")
    rows = [_standard_row(point) if standard else _autoware_row(point) for point in message.points]
    after_s, x, y, yaw, speed = np.array(rows, np.float64).T
    return PublishedPlan(
        t0_ns=stamp_ns(message.header.stamp),
        frame_id=message.header.frame_id,
        after_s=after_s,
        xy=np.stack((x, y), axis=1),
        yaw=np.unwrap(yaw),
        speed=speed,
    )


def _standard_row(point: Any) -> tuple[float, float, float, float, float]:
    place = point.transforms[0]
    # Velocities are in the vehicle's own frame at the point.
    speed = point.velocities[0].linear.x
    return _seconds(point.time_from_start), place.translation.x, place.translation.y, _yaw(place.rotation), speed


def _autoware_row(point: Any) -> tuple[float, float, float, float, float]:
    place, speed = point.pose, point.longitudinal_velocity_mps
    return _seconds(point.time_from_start), place.position.x, place.position.y, _yaw(place.orientation), speed


def _seconds(duration: Any) -> float:
    return float(duration.sec + 1e-9 * duration.nanosec)


def _yaw(q: Quaternion) -> float:
    return math.atan2(2 * (q.w * q.z + q.x * q.y), 1 - 2 * (q.y * q.y + q.z * q.z))
