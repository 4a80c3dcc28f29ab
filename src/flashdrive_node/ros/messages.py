"""Typed data from messages and messages from typed data. No state, no node.

Poses of outputs are given in one frame per node: the vehicle's frame at t0 ("base"), or the odometry's frame, reached
through the odometry pose at t0 and never through the current one. Stamps of outputs are t0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from geometry_msgs.msg import Point, Pose, PoseArray, PoseStamped, Quaternion, Transform, Twist, Vector3
from nav_msgs.msg import Odometry, Path
from numpy.typing import NDArray
from std_msgs.msg import Header
from trajectory_msgs.msg import MultiDOFJointTrajectory, MultiDOFJointTrajectoryPoint

from flashdrive_node.engine.protocol import EngineInfo, Prediction, TrajectorySample
from flashdrive_node.runtime.observation import OdometrySample
from flashdrive_node.runtime.pipeline import Delivery

#: Spacing of the waypoints, seconds (the first one is at t0 + this).
WAYPOINT_DT_S = 0.1
#: Version of the JSON record; counts up when a key changes its meaning or goes.
RECORD_VERSION = 1


def stamp_ns(stamp: Time) -> int:
    """Nanoseconds of a message stamp."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def stamp_message(time_ns: int) -> Time:
    """Message stamp of nanoseconds."""
    return Time(sec=time_ns // 1_000_000_000, nanosec=time_ns % 1_000_000_000)


def duration_message(seconds: float) -> Duration:
    """Message duration, rounded to whole nanoseconds."""
    nanoseconds = round(seconds * 1e9)
    return Duration(sec=nanoseconds // 1_000_000_000, nanosec=nanoseconds % 1_000_000_000)


def odometry_sample(message: Odometry) -> OdometrySample:
    """Pose and twist of one odometry message."""
    pose, twist = message.pose.pose, message.twist.twist
    p, q, v, w = pose.position, pose.orientation, twist.linear, twist.angular
    return OdometrySample(
        stamp_ns=stamp_ns(message.header.stamp),
        frame_id=message.header.frame_id,
        child_frame_id=message.child_frame_id,
        position=(p.x, p.y, p.z),
        orientation_xyzw=(q.x, q.y, q.z, q.w),
        linear_velocity=(v.x, v.y, v.z),
        angular_velocity=(w.x, w.y, w.z),
    )


def odometry_message(
    time_ns: int, frame: str, base_frame: str, pose: tuple[float, float, float], speed: float, yaw_rate: float
) -> Odometry:
    """Motion in the plane.

    Args:
        time_ns: Stamp.
        frame, base_frame: Names of the frame of the pose, and of the vehicle's own.
        pose: x, y (metres) and yaw (radians) in ``frame``.
        speed: Forwards, m/s.
        yaw_rate: To the left, rad/s.
    """
    message = Odometry(header=Header(stamp=stamp_message(time_ns), frame_id=frame), child_frame_id=base_frame)
    x, y, yaw = pose
    message.pose.pose.position = Point(x=x, y=y)
    message.pose.pose.orientation = Quaternion(z=math.sin(yaw / 2), w=math.cos(yaw / 2))
    message.twist.twist.linear.x, message.twist.twist.angular.z = speed, yaw_rate
    return message


@dataclass(frozen=True)
class OutputFrame:
    """Where the outputs of one window are: a frame's name and the vehicle's pose at t0 in it."""

    frame_id: str
    #: Metres.
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    orientation_xyzw: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)

    def points(self, xyz: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Vehicle points [N, 3] in this frame [N, 3], metres."""
        x, y, z, w = self.orientation_xyzw
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        return np.asarray(xyz, np.float64) @ rotation.T + np.array(self.position)

    def orientations(self, yaw: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Orientations [N, 4] (x, y, z, w) of headings [N] about the vehicle's up axis, radians."""
        x, y, z, w = self.orientation_xyzw
        s, c = np.sin(np.asarray(yaw, np.float64) / 2), np.cos(np.asarray(yaw, np.float64) / 2)
        # Product of the frame's quaternion and (0, 0, s, c).
        return np.stack((x * c + y * s, y * c - x * s, z * c + w * s, w * c - z * s), axis=-1)


def poses(sample: TrajectorySample, frame: OutputFrame) -> list[Pose]:
    """The waypoints of one sample as poses in the output frame."""
    return [
        Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=qw))
        for (x, y, z), (qx, qy, qz, qw) in zip(
            frame.points(sample.xyz).tolist(), frame.orientations(sample.yaw).tolist(), strict=True
        )
    ]


def path_message(header: Header, waypoints: Sequence[Pose]) -> Path:
    """The chosen trajectory without its times; every pose carries t0, the time that all of it was planned at."""
    return Path(header=header, poses=[PoseStamped(header=header, pose=pose) for pose in waypoints])


def samples_message(header: Header, prediction: Prediction, frame: OutputFrame) -> PoseArray:
    """All samples behind each other: sample k is ``poses[64 * k : 64 * (k + 1)]``."""
    return PoseArray(header=header, poses=[pose for sample in prediction.samples for pose in poses(sample, frame)])


def joint_trajectory_message(
    header: Header, base_frame: str, sample: TrajectorySample, waypoints: Sequence[Pose]
) -> MultiDOFJointTrajectory:
    """The chosen trajectory; velocities and accelerations are in the vehicle's frame at each waypoint."""
    points = []
    rows = zip(waypoints, sample.speed.tolist(), sample.acceleration.tolist(), _yaw_rate(sample), strict=True)
    for k, (pose, speed, acceleration, yaw_rate) in enumerate(rows, 1):
        p = pose.position
        points.append(
            MultiDOFJointTrajectoryPoint(
                transforms=[Transform(translation=Vector3(x=p.x, y=p.y, z=p.z), rotation=pose.orientation)],
                velocities=[Twist(linear=Vector3(x=speed), angular=Vector3(z=yaw_rate))],
                accelerations=[Twist(linear=Vector3(x=acceleration))],
                time_from_start=duration_message(k * WAYPOINT_DT_S),
            )
        )
    return MultiDOFJointTrajectory(header=header, joint_names=[base_frame], points=points)


def autoware_trajectory_message(header: Header, sample: TrajectorySample, waypoints: Sequence[Pose]) -> Any:
    """The chosen trajectory for Autoware; only where ``autoware_planning_msgs`` is installed."""
    from autoware_planning_msgs.msg import Trajectory, TrajectoryPoint

    rows = zip(waypoints, sample.speed.tolist(), sample.acceleration.tolist(), _yaw_rate(sample), strict=True)
    points = [
        TrajectoryPoint(
            time_from_start=duration_message(k * WAYPOINT_DT_S),
            pose=pose,
            longitudinal_velocity_mps=speed,
            acceleration_mps2=acceleration,
            heading_rate_rps=yaw_rate,
        )
        for k, (pose, speed, acceleration, yaw_rate) in enumerate(rows, 1)
    ]
    return Trajectory(header=header, points=points)


def trajectory_type() -> Any:
    """Message type of ``~/output/trajectory``: Autoware's where it is installed, else the standard one."""
    if find_spec("autoware_planning_msgs") is not None:
        from autoware_planning_msgs.msg import Trajectory

        return Trajectory
    return MultiDOFJointTrajectory


def _yaw_rate(sample: TrajectorySample) -> list[float]:
    rate: list[float] = (sample.speed * sample.curvature).tolist()
    return rate


def record_json(
    delivery: Delivery,
    prediction: Prediction,
    frame_id: str,
    engine: EngineInfo | None,
    published_ns: int,
    timings_ms: dict[str, float],
) -> str:
    """One window as JSON: what ties text, trajectory, timings, window and frames together.

    Standard messages carry it, so that it can be recorded and read everywhere without building an interface package.

    Keys: ``version`` (int); ``window_id``; ``t0_ns`` and ``published_ns`` (ROS clock); ``frame_id`` of the messages;
    ``frame_stamps_ns``: camera name to the stamps of its frames, oldest first; ``camera_indices``: camera name to
    index in the model; ``nav_text`` or null; ``chosen`` (index into ``samples``); ``samples``: list of ``end_m``
    [x, y, z], ``end_yaw_rad``, ``end_speed_m_s``, ``reasoning``, ``reasoning_complete``; ``trajectory``: the chosen
    sample as lists of 64 (``xyz_m`` [64][3], ``yaw_rad``, ``speed_m_s``, ``acceleration_m_s2``, ``curvature_1_m``) in
    the vehicle frame at t0 whatever ``frame_id`` is; ``pose_at_t0``: ``frame_id``, ``position_m`` and
    ``orientation_xyzw`` of the vehicle by the odometry; ``initial_speed_m_s``; ``reasoning`` and
    ``reasoning_complete`` of the chosen sample; ``reasoning_tokens``: its tokens as pairs of text and whether the
    drafter guessed it (routine) or the model had to find it (deliberative), empty without a drafter;
    ``timings_ms`` by stage; ``metrics`` of the engine; ``engine``: the fields of EngineInfo (``name``,
    ``checkpoint``, ``sha256``, ...), or null.
    """
    chosen = prediction.trajectory
    document = {
        "version": RECORD_VERSION,
        "window_id": prediction.window_id,
        "t0_ns": prediction.t0_ns,
        "published_ns": published_ns,
        "frame_id": frame_id,
        "frame_stamps_ns": {name: list(stamps) for name, stamps in delivery.stamps_ns.items()},
        "camera_indices": {
            name: camera.camera_index
            for name, camera in zip(delivery.stamps_ns, delivery.observation.cameras, strict=True)
        },
        "nav_text": delivery.observation.nav_text,
        "chosen": prediction.chosen,
        "samples": [
            {
                "end_m": _rounded(sample.xyz[-1]),
                "end_yaw_rad": round(float(sample.yaw[-1]), 4),
                "end_speed_m_s": round(float(sample.speed[-1]), 4),
                "reasoning": sample.reasoning,
                "reasoning_complete": sample.reasoning_complete,
            }
            for sample in prediction.samples
        ],
        "trajectory": {
            "xyz_m": _rounded(chosen.xyz),
            "yaw_rad": _rounded(chosen.yaw),
            "speed_m_s": _rounded(chosen.speed),
            "acceleration_m_s2": _rounded(chosen.acceleration),
            "curvature_1_m": _rounded(chosen.curvature, 6),
        },
        "pose_at_t0": {
            "frame_id": delivery.ego.frame_id,
            "position_m": _rounded(delivery.ego.position),
            "orientation_xyzw": _rounded(delivery.ego.orientation_xyzw, 7),
        },
        "initial_speed_m_s": round(prediction.initial_speed, 4),
        "reasoning": chosen.reasoning,
        "reasoning_complete": chosen.reasoning_complete,
        "reasoning_tokens": [[token.text, token.routine] for token in chosen.tokens],
        "timings_ms": {stage: round(value, 3) for stage, value in timings_ms.items()},
        "metrics": prediction.metrics,
        "engine": asdict(engine) if engine is not None else None,
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _rounded(values: NDArray[np.floating[Any]], decimals: int = 4) -> Any:
    # float32 to decimal text would print 17 digits; millimetres and tenths of milliradians are enough.
    return np.round(values.astype(np.float64), decimals).tolist()
