"""Reading rosbag2 recordings (sqlite3 or mcap, any compression) without a ROS install.

Needs the package ``rosbags``, which the extras ``ros`` and ``tools`` install.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection
from rosbags.typesys import Stores, get_typestore

from flashdrive_node.runtime.observation import OdometrySample, RawImage
from flashdrive_node.runtime.rig import Rig

COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
IMAGE = "sensor_msgs/msg/Image"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
ODOMETRY = "nav_msgs/msg/Odometry"
STRING = "std_msgs/msg/String"
DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"


class BagError(Exception):
    """A recording cannot be read, or does not hold what was asked for."""


@contextmanager
def open_bag(path: Path) -> Iterator[AnyReader]:
    """Open a rosbag2 recording: its directory, or one .mcap or .db3 file.

    Raises:
        BagError: The path is missing, is no rosbag2 recording, is damaged, or holds no message.
    """
    path = Path(path)
    if not path.exists():
        raise BagError(f"{path}: a rosbag2 directory or file is required, found nothing there")
    if path.is_dir() and not (path / "metadata.yaml").exists():
        inside = sorted(p.name for p in path.iterdir())[:8]
        raise BagError(f"{path}: a rosbag2 directory with metadata.yaml is required, found {inside or 'nothing'} in it")
    try:
        reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
        reader.open()
    # The storage readers raise whatever their parsers meet: sqlite3, struct, Unicode, YAML and assertion errors.
    except Exception as error:
        raise BagError(f"{path}: not a readable rosbag2 recording ({type(error).__name__}: {error})") from error
    try:
        if reader.message_count == 0:
            raise BagError(f"{path}: a recording with messages is required, found none in it")
        yield reader
    finally:
        reader.close()


def messages(
    reader: AnyReader, connections: Sequence[Connection], start_ns: int | None = None, stop_ns: int | None = None
) -> Iterator[tuple[Connection, int, bytes]]:
    """Connection, recording time in nanoseconds and CDR bytes of every message, in order of recording time.

    Raises:
        BagError: The recording is damaged; says after which time.
    """
    last = reader.start_time
    try:
        for connection, stamp, raw in reader.messages(connections, start=start_ns, stop=stop_ns):
            last = stamp
            yield connection, stamp, raw
    except (GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:
        at_s = (last - reader.start_time) / 1e9
        raise BagError(
            f"{reader.paths[0]}: damaged after {at_s:.3f} s of {reader.duration / 1e9:.3f} s "
            f"({type(error).__name__}: {error})"
        ) from error


def header_stamp_ns(message: Any) -> int:
    """Header stamp of a deserialised message, nanoseconds."""
    return int(message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec)


def raw_image(message: Any, message_type: str) -> RawImage:
    """A deserialised image message, compressed or raw."""
    stamp_ns = header_stamp_ns(message)
    if message_type == COMPRESSED_IMAGE:
        return RawImage(stamp_ns, 0, message.format, 0, 0, 0, False, message.data.data)
    big = bool(message.is_bigendian)
    return RawImage(stamp_ns, 0, message.encoding, message.width, message.height, message.step, big, message.data.data)


def odometry_sample(message: Any) -> OdometrySample:
    """A deserialised nav_msgs/Odometry."""
    pose, twist = message.pose.pose, message.twist.twist
    p, q, v, w = pose.position, pose.orientation, twist.linear, twist.angular
    return OdometrySample(
        stamp_ns=header_stamp_ns(message),
        frame_id=message.header.frame_id,
        child_frame_id=message.child_frame_id,
        position=(p.x, p.y, p.z),
        orientation_xyzw=(q.x, q.y, q.z, q.w),
        linear_velocity=(v.x, v.y, v.z),
        angular_velocity=(w.x, w.y, w.z),
    )


def rig_topics(rig: Rig) -> dict[str, tuple[str, bool]]:
    """Message type of every topic that a rig uses, and whether a recording must hold it."""
    topics: dict[str, tuple[str, bool]] = {}
    for camera in rig.cameras:
        topics[camera.topic] = (COMPRESSED_IMAGE if camera.transport == "compressed" else IMAGE, True)
        if camera.camera_info_topic is not None:
            topics[camera.camera_info_topic] = (CAMERA_INFO, False)
    topics[rig.odometry_topic] = (ODOMETRY, True)
    if rig.navigation_topic is not None:
        topics[rig.navigation_topic] = (STRING, False)
    return topics


def select(reader: AnyReader, rig: Rig) -> list[Connection]:
    """The connections of a recording that a rig uses.

    Raises:
        BagError: Required topics are missing, empty or of another type; lists all of them and what the recording has.
    """
    problems: list[str] = []
    chosen: list[Connection] = []
    held = reader.topics
    for topic, (kind, required) in rig_topics(rig).items():
        found = held.get(topic)
        if found is None or found.msgcount == 0:
            if required:
                problems.append(
                    f"{topic} ({kind}) is required, found {'no such topic' if found is None else 'it empty'}"
                )
        elif found.msgtype != kind:
            problems.append(f"{topic} must be {kind}, found {found.msgtype}")
        else:
            chosen += found.connections
    if problems:
        has = "\n  ".join(f"{name} ({info.msgtype}, {info.msgcount})" for name, info in sorted(held.items()))
        raise BagError(
            f"{reader.paths[0]}: does not fit the rig {rig.name!r}:\n  "
            + "\n  ".join(problems)
            + f"\nthe recording has:\n  {has}"
        )
    return chosen


def definition(message_type: str, share: Sequence[Path] = ()) -> tuple[str, str]:
    """Message definition and RIHS01 type hash of a type, for writing a recording.

    Args:
        message_type: For example ``nav_msgs/msg/Path``.
        share: ``share`` directories of ROS installs, searched for types that are not in the Jazzy distribution.

    Raises:
        BagError: The type is unknown here.
    """
    from rosbags.typesys import get_types_from_msg

    store = get_typestore(Stores.ROS2_JAZZY)
    wanted, seen = [message_type], set()
    while wanted:
        name = wanted.pop()
        if name in store.fielddefs or name in seen:
            continue
        seen.add(name)
        file = next((p for s in share if (p := s / f"{name}.msg").exists()), None)
        if file is None:
            raise BagError(f"no definition of {name} found (Jazzy's own messages and {[str(s) for s in share]})")
        types: dict[str, Any] = get_types_from_msg(file.read_text(), name)
        for _, fields in types.values():
            wanted += [t for _, kind in fields for t in _named_types(kind)]
        store.register(types)
    text, _ = store.generate_msgdef(message_type, ros_version=2)
    return text, store.hash_rihs01(message_type)


def _named_types(kind: Any) -> list[str]:
    """Message types inside one field description of rosbags: (node type, name or (element, length))."""
    if isinstance(kind, tuple):
        return [name for part in kind for name in _named_types(part)]
    return [kind] if isinstance(kind, str) and "/msg/" in kind else []
