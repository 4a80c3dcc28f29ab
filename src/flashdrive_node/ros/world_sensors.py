"""The sensors of a world's vehicle on the topics of a rig: cameras, calibration, odometry and navigation text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header, String

from flashdrive_node.evaluation.world_views import world_cameras
from flashdrive_node.ros.messages import odometry_message, stamp_message
from flashdrive_node.ros.picture_messages import Picture, camera_info_message, compressed_message, raw_message
from flashdrive_node.runtime.rig import Rig

#: Frame of the odometry: the world's own.
ODOMETRY_FRAME = "odom"


class WorldSensors:
    """Publishers of everything that the driving node subscribes to.

    Args:
        node: Makes the publishers.
        rig: Names topics, transports and sizes; every camera of it must be one of the world's.
        file_format: "jpeg" or "png" for cameras with compressed transport.

    Raises:
        RigError: The rig has a camera that the world has not.
    """

    def __init__(self, node: Node, rig: Rig, file_format: str):
        self._rig = rig
        self.base_frame = rig.base_frame
        self._file_format = file_format
        #: The world's cameras by index, in the rig's order.
        self.cameras = world_cameras(rig)
        self._pictures: dict[int, Publisher] = {}
        self._infos: dict[int, Publisher] = {}
        for spec in rig.cameras:
            kind: Any = CompressedImage if spec.transport == "compressed" else Image
            self._pictures[spec.index] = node.create_publisher(kind, spec.topic, QoSProfile(depth=5))
            if spec.camera_info_topic is not None:
                self._infos[spec.index] = node.create_publisher(CameraInfo, spec.camera_info_topic, QoSProfile(depth=5))
        self._odometry = node.create_publisher(Odometry, rig.odometry_topic, QoSProfile(depth=50))
        self._navigation: Publisher | None = None
        if rig.navigation_topic is not None:
            self._navigation = node.create_publisher(String, rig.navigation_topic, QoSProfile(depth=5))

    @property
    def has_navigation(self) -> bool:
        """Whether the rig has a topic for navigation texts."""
        return self._navigation is not None

    def unheard(self) -> list[str]:
        """Topics of cameras and odometry that nobody subscribes to."""
        required = [self._odometry, *self._pictures.values()]
        return [p.topic_name for p in required if p.get_subscription_count() == 0]

    def send_navigation(self, text: str | None) -> None:
        """The instruction from now on; None clears it."""
        if self._navigation is not None:
            self._navigation.publish(String(data=text or ""))

    def send_pictures(self, time_ns: int, pictures: Mapping[int, Picture]) -> None:
        """One picture RGB uint8 [H, W, 3] of every camera, by index."""
        for spec in self._rig.cameras:
            header, picture = Header(stamp=stamp_message(time_ns), frame_id=spec.name), pictures[spec.index]
            if spec.transport == "compressed":
                message = compressed_message(header, picture, self._file_format)
            else:
                message = raw_message(header, picture)
            self._pictures[spec.index].publish(message)
            if spec.index in self._infos:
                height, width, _ = picture.shape
                info = camera_info_message(header, self.cameras[spec.index], width, height)
                self._infos[spec.index].publish(info)

    def send_odometry(self, time_ns: int, pose: tuple[float, float, float], speed: float, yaw_rate: float) -> None:
        """Pose (x, y, yaw) in the odometry's frame, metres and radians; m/s and rad/s."""
        frames = ODOMETRY_FRAME, self.base_frame
        self._odometry.publish(odometry_message(time_ns, *frames, pose, speed, yaw_rate))


def wait_until_heard(sensors: WorldSensors, timeout_s: float, meanwhile: Callable[[], None]) -> list[str]:
    """Wait until every camera and the odometry has a subscriber; the topics that have none when the time is over."""
    deadline = time.monotonic() + timeout_s
    while (missing := sensors.unheard()) and time.monotonic() < deadline:
        meanwhile()
        time.sleep(0.05)
    return missing
