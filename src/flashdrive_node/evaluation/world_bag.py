"""Writes the drive of a scene's expert as a rosbag2 recording: what the vehicle's sensors publish, and the truth.

Pictures, odometry and navigation text come on the topics of a rig, so the recording plays through the node like one
from a vehicle. Why the expert drives as it does comes beside them, as JSON on a topic that the node does not read.
Same arguments on the same machine, same messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from flashdrive_node.evaluation.bag_truth import TRUTH_TOPIC
from flashdrive_node.evaluation.picture_files import jpeg_file
from flashdrive_node.evaluation.world_views import camera_model, world_cameras
from flashdrive_node.runtime.camera_model import CameraModel
from flashdrive_node.runtime.rig import Rig, RigError
from flashdrive_node.runtime.rotation import quaternion_from_matrix
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import Episode, record
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.reasoning import Pace, Start
from flashdrive_node.world.render import render
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, move
from flashdrive_node.world.steering import Manoeuvre

#: Header stamp of the first frame of a bag, nanoseconds: a fixed day, so that bags are reproducible.
START_NS = 1_767_225_600_000_000_000
#: How long after its header stamp a message was recorded: exposure, encoding and transport of a camera; a bus message.
CAMERA_DELAY_NS = 20_000_000
ODOMETRY_DELAY_NS = 1_000_000
#: Odometry messages per step of the world: 50 Hz.
_ODOMETRY_PER_STEP = 5

_STATIC_TOPIC = "/tf_static"
_SECOND = 1_000_000_000
_FOREVER = QosTime(9223372036, 854775807)
_TYPES = {
    "image": "sensor_msgs/msg/CompressedImage",
    "info": "sensor_msgs/msg/CameraInfo",
    "odometry": "nav_msgs/msg/Odometry",
    "text": "std_msgs/msg/String",
    "transforms": "tf2_msgs/msg/TFMessage",
}


@dataclass(frozen=True)
class SceneChoice:
    """Which scene is driven, and for how long."""

    split: str
    index: int
    seconds: float

    @property
    def steps(self) -> int:
        """Steps of the world."""
        return round(self.seconds / DT_S)

    def drive(self) -> Episode:
        """The expert's drive of this scene, on the CPU."""
        return record(sample_scenes(scene_keys(self.split, [self.index])), self.steps + 1)


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are made: size in pixels, rays per pixel and side, JPEG quality 0 to 100, torch device."""

    width: int = 576
    height: int = 320
    samples: int = 2
    quality: int = 85
    device: str = "cpu"


def write_world_bag(
    path: Path,
    rig: Rig,
    choice: SceneChoice,
    pictures: PictureSettings,
    *,
    storage: StoragePlugin = StoragePlugin.MCAP,
    on_progress: Callable[[int], object] | None = None,
) -> Episode:
    """Drive a scene and write it.

    Args:
        path: Directory of the new bag; must not exist.
        rig: Topics and names. Its cameras must be cameras of the world, compressed, at the world's 10 Hz; a camera's
            own size comes before that of `pictures`.
        choice: The scene.
        pictures: How to render them.
        storage: Storage format of the bag.
        on_progress: Called with the number of steps that have been written.

    Returns:
        The drive that was written.

    Raises:
        FileExistsError: The path exists.
        RigError: The rig has cameras that cannot be written; names them all.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"a new directory is required for the bag, {path} exists")
    _check(rig)
    episode = choice.drive()
    source = _Source(rig, choice, episode, pictures)
    writer = Writer(path, version=9, storage_plugin=storage)
    if storage == StoragePlugin.MCAP:
        # Chunks of the file itself, which every reader of MCAP unpacks: odometry and calibration shrink to a tenth.
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
    with writer:
        connections = {
            topic: writer.add_connection(topic, kind, typestore=source.store, offered_qos_profiles=[_qos(topic, kind)])
            for topic, kind in source.topics()
        }
        for step in range(choice.steps + 1):
            for recorded, topic, message in sorted(source.messages(step), key=lambda m: (m[0], m[1])):
                connection = connections[topic]
                writer.write(connection, recorded, source.store.serialize_cdr(message, connection.msgtype))
            if on_progress is not None:
                on_progress(step)
    return episode


def truth(episode: Episode, step: int) -> dict[str, str]:
    """What the expert does at a step and why: the sentence, and the names of its parts."""
    reason = episode.reason(step)
    return {
        "sentence": episode.sentences(step)[0],
        "cause": Cause(int(reason.cause)).name,
        "second": Cause(int(reason.second)).name,
        "pace": Pace(int(reason.pace)).name,
        "manoeuvre": Manoeuvre(int(reason.manoeuvre)).name,
        "start": Start(int(reason.start)).name,
    }


def _check(rig: Rig) -> None:
    world_cameras(rig)
    problems = [f"camera {c.name!r}: transport 'compressed' is required" for c in rig.cameras if c.transport == "raw"]
    problems += [
        f"camera {c.name!r}: rate_hz {1 / DT_S:g} is required (a step of the world), found {c.rate_hz:g}"
        for c in rig.cameras
        if not math.isclose(c.rate_hz, 1 / DT_S)
    ]
    if problems:
        raise RigError(rig.name, problems)


class _Source:
    """Messages of one drive, step by step."""

    def __init__(self, rig: Rig, choice: SceneChoice, episode: Episode, pictures: PictureSettings):
        self.store = get_typestore(Stores.ROS2_JAZZY)
        self._rig, self._choice, self._episode, self._pictures = rig, choice, episode, pictures
        self._scene = move(episode.scene, pictures.device)
        self._cameras = world_cameras(rig)
        sizes = {c.index: (c.width or pictures.width, c.height or pictures.height) for c in rig.cameras}
        self._models = {index: camera_model(camera, *sizes[index]) for index, camera in self._cameras.items()}

    def topics(self) -> Iterator[tuple[str, str]]:
        """Topics and message types."""
        yield _STATIC_TOPIC, _TYPES["transforms"]
        for camera in self._rig.cameras:
            yield camera.topic, _TYPES["image"]
            if camera.camera_info_topic is not None:
                yield camera.camera_info_topic, _TYPES["info"]
        yield self._rig.odometry_topic, _TYPES["odometry"]
        if self._rig.navigation_topic is not None:
            yield self._rig.navigation_topic, _TYPES["text"]
        yield TRUTH_TOPIC, _TYPES["text"]

    def messages(self, step: int) -> Iterator[tuple[int, str, Any]]:
        """Recording time in nanoseconds, topic and message of everything that begins in a step."""
        now = _ns(step)
        if step == 0:
            yield now, _STATIC_TOPIC, self._transforms()
        # The drive's last step has no odometry behind it: no picture would follow.
        for part in range(_ODOMETRY_PER_STEP if step < self._choice.steps else 1):
            after_s = part * DT_S / _ODOMETRY_PER_STEP
            yield _ns(step, after_s) + ODOMETRY_DELAY_NS, self._rig.odometry_topic, self._odometry(step, after_s)
        if self._rig.navigation_topic is not None and step % round(1 / DT_S) == 0:
            # An empty text says that there is no instruction any more.
            text = self._episode.navigation(step)[0] or ""
            yield now, self._rig.navigation_topic, self._text(text)
        yield now, TRUTH_TOPIC, self._text(json.dumps(truth(self._episode, step) | {"stamp_ns": now, **self._place()}))
        for camera in self._rig.cameras:
            header = self._header(now, camera.name)
            picture = self._picture(step, camera.index)
            data = np.frombuffer(jpeg_file(picture, now, self._pictures.quality), np.uint8)
            message = self._make("image", header=header, format="jpeg", data=data)
            yield now + CAMERA_DELAY_NS, camera.topic, message
            if camera.camera_info_topic is not None:
                yield now + CAMERA_DELAY_NS, camera.camera_info_topic, self._info(header, self._models[camera.index])

    def _place(self) -> dict[str, Any]:
        return {"split": self._choice.split, "index": self._choice.index}

    def _picture(self, step: int, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        model = self._models[index]
        state = move(self._episode.states[step], self._pictures.device)
        view = render(self._scene, state, self._cameras[index], model.width, model.height, self._pictures.samples)
        return np.asarray(view.image[0].cpu().numpy(), np.uint8)

    def _odometry(self, step: int, after_s: float) -> Any:
        state, decision = self._episode.states[step], self._episode.decisions[step]
        x, y, yaw, speed, accel, bend = (
            float(v[0]) for v in (state.x, state.y, state.yaw, state.speed, decision.accel, decision.curvature)
        )
        # As `unicycle`, for a part of the step.
        turned = yaw + bend * (speed * after_s + accel * after_s**2 / 2)
        faster = speed + accel * after_s
        x += 0.5 * after_s * (speed * math.cos(yaw) + faster * math.cos(turned))
        y += 0.5 * after_s * (speed * math.sin(yaw) + faster * math.sin(turned))
        vector, covariance = self.store.types["geometry_msgs/msg/Vector3"], np.zeros(36)
        pose = self._geometry("Pose", position=self._geometry("Point", x=x, y=y, z=0.0), orientation=self._yaw(turned))
        twist = self._geometry("Twist", linear=vector(faster, 0.0, 0.0), angular=vector(0.0, 0.0, bend * faster))
        return self._make(
            "odometry",
            header=self._header(_ns(step, after_s), "odom"),
            child_frame_id=self._rig.base_frame,
            pose=self._geometry("PoseWithCovariance", pose=pose, covariance=covariance),
            twist=self._geometry("TwistWithCovariance", twist=twist, covariance=covariance),
        )

    def _info(self, header: Any, model: CameraModel) -> Any:
        k = np.array(model.matrix())
        region = self.store.types["sensor_msgs/msg/RegionOfInterest"](
            x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
        )
        return self._make(
            "info",
            header=header,
            height=model.height,
            width=model.width,
            distortion_model=model.distortion_model,
            d=np.array(model.coefficients),
            k=k,
            r=np.eye(3).reshape(-1),
            p=np.insert(k.reshape(3, 3), 3, 0.0, axis=1).reshape(-1),
            binning_x=0,
            binning_y=0,
            roi=region,
        )

    def _transforms(self) -> Any:
        transforms = []
        for camera in self._rig.cameras:
            model = self._models[camera.index]
            qx, qy, qz, qw = quaternion_from_matrix(model.rotation).tolist()
            x, y, z = model.position.tolist()
            transform = self._geometry(
                "Transform",
                translation=self._geometry("Vector3", x=x, y=y, z=z),
                rotation=self._geometry("Quaternion", x=qx, y=qy, z=qz, w=qw),
            )
            header = self._header(START_NS, self._rig.base_frame)
            transforms.append(
                self._geometry("TransformStamped", header=header, child_frame_id=camera.name, transform=transform)
            )
        return self._make("transforms", transforms=transforms)

    def _header(self, stamp_ns: int, frame_id: str) -> Any:
        sec, nanosec = divmod(stamp_ns, _SECOND)
        stamp = self.store.types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
        return self.store.types["std_msgs/msg/Header"](stamp=stamp, frame_id=frame_id)

    def _text(self, text: str) -> Any:
        return self._make("text", data=text)

    def _yaw(self, yaw: float) -> Any:
        return self._geometry("Quaternion", x=0.0, y=0.0, z=math.sin(yaw / 2), w=math.cos(yaw / 2))

    def _geometry(self, name: str, **values: Any) -> Any:
        return self.store.types[f"geometry_msgs/msg/{name}"](**values)

    def _make(self, kind: str, **values: Any) -> Any:
        return self.store.types[_TYPES[kind]](**values)


def _ns(step: int, after_s: float = 0.0) -> int:
    """Time of a moment after the beginning of a step."""
    return START_NS + round((step * DT_S + after_s) * _SECOND)


def _qos(topic: str, kind: str) -> Qos:
    sensor = kind.startswith("sensor_msgs")
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=10,
        reliability=QosReliability.BEST_EFFORT if sensor else QosReliability.RELIABLE,
        durability=QosDurability.TRANSIENT_LOCAL if topic == _STATIC_TOPIC else QosDurability.VOLATILE,
        deadline=_FOREVER,
        lifespan=_FOREVER,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_FOREVER,
        avoid_ros_namespace_conventions=False,
    )
