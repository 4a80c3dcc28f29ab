"""Small recordings of a known drive, written message by message: raw pictures whose value tells their time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from flashdrive_node.runtime.rig import CameraSpec, Rig

STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES = STORE.types
START_NS = 1_700_000_000_000_000_000
#: Speed in m/s and yaw rate in rad/s of the drive.
SPEED, TURN = 8.0, 0.1
#: Height and width of the pictures.
SIZE = (36, 64)

RIG = Rig(
    "driven",
    tuple(CameraSpec(f"c{index}", index, f"/c{index}", "raw", 10.0) for index in (0, 1)),
    "/odometry",
    "/navigation",
)

#: x, y, yaw at a time.
Motion = Callable[[float], tuple[float, float, float]]


def circle(time_s: float) -> tuple[float, float, float]:
    radius, yaw = SPEED / TURN, TURN * time_s
    return 5.0 + radius * math.sin(yaw), -3.0 + radius * (1 - math.cos(yaw)), yaw


def shade(time_s: float) -> int:
    """Value of every pixel of a picture."""
    return round(time_s * 10) % 200 + 20


def write_bag(
    path: Path,
    seconds: float,
    *,
    motion: Motion = circle,
    shade: Callable[[float], int] = shade,
    odometry_seconds: float | None = None,
    missing: tuple[float, float] = (0.0, 0.0),
    no_odometry: tuple[float, float] = (0.0, 0.0),
    cut_picture_at: float | None = None,
) -> Path:
    """A recording; pictures between the times of `missing` and odometry between those of `no_odometry` are left out."""
    header_of = TYPES["std_msgs/msg/Header"]
    time_of = TYPES["builtin_interfaces/msg/Time"]

    def header(time_s: float, frame: str) -> object:
        stamp = START_NS + round(time_s * 1e9)
        return header_of(time_of(sec=stamp // 10**9, nanosec=stamp % 10**9), frame)

    events: list[tuple[float, str, object]] = []
    for k in range(round((seconds if odometry_seconds is None else odometry_seconds) * 50) + 1):
        if not no_odometry[0] < k / 50 < no_odometry[1]:
            events.append((k / 50 + 0.001, "/odometry", _odometry(header(k / 50, "odom"), motion(k / 50))))
    height, width = SIZE
    for k in range(round(seconds * 10) + 1):
        time_s = k / 10
        if missing[0] < time_s < missing[1]:
            continue
        data = np.full(height * width * 3, shade(time_s), np.uint8)
        data = data[:-1] if cut_picture_at == time_s else data
        for camera in RIG.cameras:
            image = TYPES["sensor_msgs/msg/Image"](
                header(time_s, camera.name), height, width, "rgb8", 0, 3 * width, data
            )
            events.append((time_s + 0.02, camera.topic, image))
    for time_s, text in ((0.0, "Turn left in 40m"), (6.0, "")):
        events.append((time_s, "/navigation", TYPES["std_msgs/msg/String"](text)))
    kinds = {"/odometry": "nav_msgs/msg/Odometry", "/navigation": "std_msgs/msg/String"}
    kinds |= {camera.topic: "sensor_msgs/msg/Image" for camera in RIG.cameras}
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        topics = {topic: writer.add_connection(topic, kind, typestore=STORE) for topic, kind in kinds.items()}
        for time_s, topic, message in sorted(events, key=lambda event: event[:2]):
            raw = STORE.serialize_cdr(message, kinds[topic])
            writer.write(topics[topic], START_NS + round(time_s * 1e9), raw)
    return path


def _odometry(header: object, pose: tuple[float, float, float]) -> object:
    x, y, yaw = pose
    vector, point = TYPES["geometry_msgs/msg/Vector3"], TYPES["geometry_msgs/msg/Point"]
    orientation = TYPES["geometry_msgs/msg/Quaternion"](0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2))
    covariance = np.zeros(36)
    at = TYPES["geometry_msgs/msg/Pose"](point(x, y, 0.0), orientation)
    twist = TYPES["geometry_msgs/msg/Twist"](vector(SPEED, 0.0, 0.0), vector(0.0, 0.0, TURN))
    return TYPES["nav_msgs/msg/Odometry"](
        header,
        "base_link",
        TYPES["geometry_msgs/msg/PoseWithCovariance"](at, covariance),
        TYPES["geometry_msgs/msg/TwistWithCovariance"](twist, covariance),
    )
