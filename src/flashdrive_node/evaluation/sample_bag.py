"""Makes a rosbag2 recording of a drawn drive, for demos, tests and first steps without a vehicle.

The pictures and the odometry come from one :class:`~flashdrive_node.evaluation.drawn_scene.Drive`, so what the cameras
show agrees with how the vehicle moves. Same arguments, same bag, byte for byte in every message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from flashdrive_node.evaluation.drawn_scene import CAMERA_VIEWS, Drive
from flashdrive_node.runtime.rig import CameraSpec, Rig

#: Header stamp of the first frame of a bag, nanoseconds: a fixed day, so that bags are reproducible.
START_NS = 1_767_225_600_000_000_000
#: How long after its header stamp a message was recorded: exposure, encoding and transport of a camera; a bus message.
CAMERA_DELAY_NS = 20_000_000
ODOMETRY_DELAY_NS = 1_000_000
ODOMETRY_HZ = 50.0

_SECOND = 1_000_000_000
_FOREVER = QosTime(9223372036, 854775807)


@dataclass(frozen=True)
class BagSummary:
    """What was written."""

    path: Path
    frames: int
    odometry: int
    seconds: float


def make_synthetic_bag(
    path: Path,
    rig: Rig,
    *,
    seconds: float = 12.0,
    width: int = 576,
    height: int = 320,
    seed: int = 0,
    jpeg_quality: int = 85,
    storage: StoragePlugin = StoragePlugin.MCAP,
    gap: tuple[float, float] | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> BagSummary:
    """Write a drawn drive as a rosbag2 recording with the topics of a rig.

    Args:
        path: Directory of the new bag; must not exist.
        rig: Camera topics, indices and rates, odometry and navigation topics. All cameras must be compressed ones.
        seconds: Length of the drive.
        width: Columns of every picture (a camera's own ``width`` in the rig comes first).
        height: Rows of every picture (likewise).
        seed: Draws road, roadside and speed.
        jpeg_quality: 0 to 100.
        storage: Storage format of the bag.
        gap: Leaves out the camera frames between two times in seconds, to show what a lost camera does.
        on_progress: Called with the time of the drive that has been written, in seconds.

    Raises:
        FileExistsError: The path exists.
        ValueError: A camera of the rig is not a compressed one, or its index has no view.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"a new directory is required for the bag, {path} exists")
    problems = [f"camera {c.name}: transport 'compressed' is required" for c in rig.cameras if c.transport == "raw"]
    problems += [f"camera {c.name}: index {c.index} has no view" for c in rig.cameras if c.index not in CAMERA_VIEWS]
    if problems:
        raise ValueError("; ".join(problems))
    drive = Drive(seconds, seed)
    store = get_typestore(Stores.ROS2_JAZZY)
    counts = {"frames": 0, "odometry": 0}
    with Writer(path, version=9, storage_plugin=storage) as writer:
        connections = {
            topic: writer.add_connection(topic, kind, typestore=store, offered_qos_profiles=[_qos(kind)])
            for topic, kind in _topics(rig)
        }
        # Every source is ordered by recording time; the bag is the merge of all.
        events: list[tuple[int, int, str, float, int]] = []
        for position, camera in enumerate(rig.cameras):
            for frame in range(math.floor(seconds * camera.rate_hz + 1e-6) + 1):
                time_s = frame / camera.rate_hz
                if gap is None or not gap[0] <= time_s < gap[1]:
                    events.append((_ns(time_s) + CAMERA_DELAY_NS, 3 + position, camera.name, time_s, frame))
        for k in range(math.floor(seconds * ODOMETRY_HZ) + 1):
            events.append((_ns(k / ODOMETRY_HZ) + ODOMETRY_DELAY_NS, 1, "odometry", k / ODOMETRY_HZ, k))
        if rig.navigation_topic is not None:
            events += [(_ns(float(s)), 0, "navigation", float(s), s) for s in range(int(seconds) + 1)]
        cameras = {camera.name: camera for camera in rig.cameras}
        for recorded, _, source, time_s, number in sorted(events):
            if source == "odometry":
                messages = iter([(rig.odometry_topic, _odometry(store, rig, drive, time_s))])
                counts["odometry"] += 1
            elif source == "navigation":
                text = store.types["std_msgs/msg/String"](data=navigation_text(drive, time_s))
                messages = iter([(str(rig.navigation_topic), text)])
            else:
                camera = cameras[source]
                size = (camera.width or width, camera.height or height)
                messages = _camera(store, drive, camera, time_s, number, size, jpeg_quality)
                counts["frames"] += 1
                if on_progress is not None:
                    on_progress(time_s)
            for topic, message in messages:
                connection = connections[topic]
                writer.write(connection, recorded, store.serialize_cdr(message, connection.msgtype))
    return BagSummary(path, counts["frames"], counts["odometry"], seconds)


def navigation_text(drive: Drive, time_s: float) -> str:
    """The instruction a navigation system would give: the direction of the road in the next 80 m."""
    ego = drive.ego(time_s)
    ahead = drive.road(np.array([ego.arc_m + 80.0]))[3, 0] - ego.yaw
    if abs(ahead) < 0.25:
        return "Continue straight in 80m"
    return f"Keep {'left' if ahead > 0 else 'right'} in 40m"


def _topics(rig: Rig) -> Iterator[tuple[str, str]]:
    for camera in rig.cameras:
        yield camera.topic, "sensor_msgs/msg/CompressedImage"
        if camera.camera_info_topic is not None:
            yield camera.camera_info_topic, "sensor_msgs/msg/CameraInfo"
    yield rig.odometry_topic, "nav_msgs/msg/Odometry"
    if rig.navigation_topic is not None:
        yield rig.navigation_topic, "std_msgs/msg/String"


def _ns(time_s: float) -> int:
    return START_NS + round(time_s * _SECOND)


def _header(store: Any, time_s: float, frame_id: str) -> Any:
    sec, nanosec = divmod(_ns(time_s), _SECOND)
    stamp = store.types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
    return store.types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)


def _camera(
    store: Any, drive: Drive, camera: CameraSpec, time_s: float, frame: int, size: tuple[int, int], quality: int
) -> Iterator[tuple[str, Any]]:
    label = f"{camera.name}  frame {frame:05d}  {time_s:.2f} s"
    picture = drive.draw(time_s, camera.index, size[0], size[1], label)
    ok, encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a {size[0]} x {size[1]} picture as JPEG")
    header = _header(store, time_s, camera.name)
    yield camera.topic, store.types["sensor_msgs/msg/CompressedImage"](header=header, format="jpeg", data=encoded)
    if camera.camera_info_topic is not None:
        yield camera.camera_info_topic, _camera_info(store, header, camera.index, size)


def _camera_info(store: Any, header: Any, index: int, size: tuple[int, int]) -> Any:
    width, height = size
    focal = width / 2 / math.tan(math.radians(CAMERA_VIEWS[index][1]) / 2)
    k = np.array([focal, 0, width / 2, 0, focal, height / 2, 0, 0, 1], np.float64)
    region = store.types["sensor_msgs/msg/RegionOfInterest"](
        x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    return store.types["sensor_msgs/msg/CameraInfo"](
        header=header,
        height=height,
        width=width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=k,
        r=np.eye(3).reshape(-1),
        p=np.insert(k.reshape(3, 3), 3, 0.0, axis=1).reshape(-1),
        binning_x=0,
        binning_y=0,
        roi=region,
    )


def _odometry(store: Any, rig: Rig, drive: Drive, time_s: float) -> Any:
    types = store.types
    ego = drive.ego(time_s)
    vector, covariance = types["geometry_msgs/msg/Vector3"], np.zeros(36)
    pose = types["geometry_msgs/msg/Pose"](
        position=types["geometry_msgs/msg/Point"](x=ego.x, y=ego.y, z=0.0),
        orientation=types["geometry_msgs/msg/Quaternion"](
            x=0.0, y=0.0, z=math.sin(ego.yaw / 2), w=math.cos(ego.yaw / 2)
        ),
    )
    twist = types["geometry_msgs/msg/Twist"](
        linear=vector(x=ego.speed, y=0.0, z=0.0), angular=vector(x=0.0, y=0.0, z=ego.yaw_rate)
    )
    return types["nav_msgs/msg/Odometry"](
        header=_header(store, time_s, "odom"),
        child_frame_id=rig.base_frame,
        pose=types["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=covariance),
        twist=types["geometry_msgs/msg/TwistWithCovariance"](twist=twist, covariance=covariance),
    )


def _qos(kind: str) -> Qos:
    reliability = QosReliability.BEST_EFFORT if kind.startswith("sensor_msgs") else QosReliability.RELIABLE
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=10,
        reliability=reliability,
        durability=QosDurability.VOLATILE,
        deadline=_FOREVER,
        lifespan=_FOREVER,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_FOREVER,
        avoid_ros_namespace_conventions=False,
    )
