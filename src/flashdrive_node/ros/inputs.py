"""Subscriptions. Callbacks only hand bytes and numbers on; what is costly happens in the pipeline's threads."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial

from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.qos import QoSPresetProfiles, QoSProfile, QoSReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions, QoSPolicyKind
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import String

from flashdrive_node.ros.bridge import BridgeError, load_converter
from flashdrive_node.ros.messages import odometry_sample
from flashdrive_node.ros.serialized import SerializedError, compressed_image, raw_image
from flashdrive_node.runtime.decode import ENCODINGS
from flashdrive_node.runtime.observation import RawImage
from flashdrive_node.runtime.pipeline import Pipeline
from flashdrive_node.runtime.rig import NAVIGATION_INPUT, ODOMETRY_INPUT, CameraSpec, Rig

#: Odometry of 400 Hz during a callback of 100 ms.
ODOMETRY_DEPTH = 50

#: Policies that `qos_overrides.*` parameters may change.
OVERRIDABLE = QoSOverridingOptions(
    policy_kinds=(QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
)


class Inputs:
    """The subscriptions of one configured node."""

    def __init__(self, node: Node, rig: Rig, pipeline: Pipeline, on_navigation: Callable[[str], None]):
        self._node = node
        self._pipeline = pipeline
        self._subscriptions: list[Subscription] = []
        raw = any(camera.transport == "raw" for camera in rig.cameras)
        self._convert = load_converter() if raw else None
        #: Width and height that CameraInfo announces, by camera index.
        self.camera_info: dict[int, tuple[int, int]] = {}
        for camera in rig.cameras:
            kind, parse = (
                (CompressedImage, compressed_image) if camera.transport == "compressed" else (Image, raw_image)
            )
            self._subscribe(
                kind,
                camera.input_topic,
                partial(self._on_image, camera.index, parse),
                QoSPresetProfiles.SENSOR_DATA.value,
                raw=True,
            )
            if camera.camera_info_topic is not None:
                self._subscribe(
                    CameraInfo,
                    camera.info_input_topic,
                    partial(self._on_camera_info, camera),
                    QoSPresetProfiles.SENSOR_DATA.value,
                )
        best_effort = QoSProfile(depth=ODOMETRY_DEPTH, reliability=QoSReliabilityPolicy.BEST_EFFORT)
        self._subscribe(Odometry, ODOMETRY_INPUT, self._on_odometry, best_effort)
        self._subscribe(String, NAVIGATION_INPUT, lambda message: on_navigation(message.data), QoSProfile(depth=1))

    def destroy(self) -> None:
        """Unsubscribe from everything."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _subscribe(
        self, kind: type, topic: str, callback: Callable[..., None], qos: QoSProfile, raw: bool = False
    ) -> None:
        # Overrides are written into the profile that is passed, and the preset belongs to the whole process.
        own = copy(qos)
        self._subscriptions.append(
            self._node.create_subscription(kind, topic, callback, own, qos_overriding_options=OVERRIDABLE, raw=raw)
        )

    def _on_image(self, index: int, parse: Callable[[bytes], RawImage], message: bytes) -> None:
        try:
            image = parse(message)
            if self._convert is not None and not image.compressed and image.encoding not in ENCODINGS:
                image = self._convert(message, image)
        except (SerializedError, BridgeError) as error:
            self._pipeline.refuse_image(index, str(error))
            return
        # Before the first /clock of a simulation there is no time to compare with.
        self._pipeline.on_image(index, image, self._node.get_clock().now().nanoseconds or None)

    def _on_odometry(self, message: Odometry) -> None:
        self._pipeline.on_odometry(odometry_sample(message), self._node.get_clock().now().nanoseconds or None)

    def _on_camera_info(self, camera: CameraSpec, message: CameraInfo) -> None:
        self.camera_info[camera.index] = (message.width, message.height)
