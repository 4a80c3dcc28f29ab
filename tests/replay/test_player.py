"""Player and recorder as processes, over real DDS."""

import json
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage

from flashdrive_node.evaluation.world_bag import START_NS
from flashdrive_node.ros.player import PlayOptions, message_class, publisher_qos
from flashdrive_node.runtime.bag import BagError, messages, open_bag, rig_topics
from flashdrive_node.runtime.rig import Rig
from support.commands import run, start, stop
from support.node_process import own_domain_id

pytestmark = pytest.mark.ros

PLAYER, RECORDER = "flashdrive_node.ros.player", "flashdrive_node.ros.recorder"


def by_topic(path: Path) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = defaultdict(list)
    with open_bag(path) as reader:
        for connection, _, raw in messages(reader, reader.connections):
            found[connection.topic].append(bytes(raw))
    return dict(found)


def rewritten(source: Path, target: Path, storage: StoragePlugin, mode: CompressionMode) -> Path:
    """The same recording in another storage and compression."""
    with open_bag(source) as reader:
        writer = Writer(target, version=9, storage_plugin=storage)
        writer.set_compression(mode, CompressionFormat.ZSTD)
        with writer:
            ids = {
                c.id: writer.add_connection(c.topic, c.msgtype, typestore=reader.typestore) for c in reader.connections
            }
            for connection, stamp, raw in messages(reader, reader.connections):
                writer.write(ids[connection.id], stamp, raw)
    return target


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def begin(out: Path, *prefixes: str) -> subprocess.Popen[str]:
        running.append(start(tmp_path, RECORDER, out, *(a for p in prefixes for a in ("--prefix", p))))
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("storage", "mode", "rate"),
    [
        (StoragePlugin.MCAP, CompressionMode.STORAGE, 8.0),
        (StoragePlugin.SQLITE3, CompressionMode.MESSAGE, 4.0),
        (StoragePlugin.SQLITE3, CompressionMode.FILE, 8.0),
    ],
)
def test_everything_arrives_unchanged_and_is_recorded(
    tmp_path: Path,
    drive: Path,
    rig: Rig,
    recorder: Callable[..., subprocess.Popen[str]],
    storage: StoragePlugin,
    mode: CompressionMode,
    rate: float,
) -> None:
    bag = rewritten(drive, tmp_path / "bag", storage, mode)
    writing = recorder(tmp_path / "out", "/camera/", "/odometry", "/navigation")
    played = run(tmp_path, PLAYER, bag, "--rate", rate, "--quiet")
    time.sleep(0.3)
    recorded = stop(writing)
    assert (played.returncode, recorded.returncode) == (0, 0), played.stderr + recorded.stderr
    result = json.loads(played.stdout)
    sent = {topic: raws for topic, raws in by_topic(drive).items() if topic in rig_topics(rig)}
    arrived = by_topic(tmp_path / "out")
    assert result["messages"] == {topic: len(raws) for topic, raws in sent.items()}
    assert result["wall_s"] >= 4.0 / rate
    # Fast DDS fills messages up to a multiple of four bytes.
    assert arrived == {topic: [raw + bytes(-len(raw) % 4) for raw in raws] for topic, raws in sent.items()}
    # What ros2 bag needs to play it: metadata with types, hashes and QoS.
    with open_bag(tmp_path / "out") as reader:
        assert all(c.digest.startswith("RIHS01_") and c.ext.offered_qos_profiles for c in reader.connections)
        assert reader.start_time >= START_NS
        assert reader.duration / 1e9 == pytest.approx(4.0, abs=0.5)


class Listener:
    """Watches /clock and one camera in the order of arrival."""

    def __init__(self, rig: Rig):
        self.context = Context()
        rclpy.init(context=self.context, domain_id=own_domain_id())
        self.node = Node("listener", context=self.context, enable_rosout=False)
        self.clock: list[int] = []
        self.late: list[float] = []
        self.stamps: list[int] = []
        deep = QoSProfile(depth=1000)
        self.node.create_subscription(Clock, "/clock", lambda m: self.clock.append(self._ns(m.clock)), deep)
        for camera in rig.cameras:
            self.node.create_subscription(CompressedImage, camera.topic, self._on_image, deep)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._executor.spin, daemon=True)
        self._thread.start()

    def _on_image(self, message: Any) -> None:
        self.stamps.append(self._ns(message.header.stamp))

    @staticmethod
    def _ns(stamp: Any) -> int:
        return int(stamp.sec) * 10**9 + int(stamp.nanosec)

    def close(self) -> None:
        self._executor.shutdown(2.0)
        self._thread.join(2.0)
        self.node.destroy_node()
        self.context.try_shutdown()


@pytest.fixture
def listener(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    watching = Listener(rig)
    yield watching
    watching.close()


def test_clock_runs_with_the_messages(
    tmp_path: Path, drive: Path, rig: Rig, listener: Listener, recorder: Callable[..., subprocess.Popen[str]]
) -> None:
    recorder(tmp_path / "out", "/odometry")
    played = run(tmp_path, PLAYER, drive, "--rate", 2, "--start-offset", 1, "--duration", 2, "--quiet")
    assert played.returncode == 0, played.stderr
    time.sleep(0.2)
    clock = np.array(listener.clock)
    # It stands at the start while the player waits, and never goes back afterwards.
    moving = clock[clock > clock.min()]
    assert (np.diff(moving) > 0).all()
    assert clock.min() - START_NS == pytest.approx(1.0e9, abs=2e7)
    # Half a second, at twice the speed, after the last message that is within the duration.
    assert clock.max() - START_NS == pytest.approx(4.0e9, abs=5e7)
    # 100 Hz on the wall clock is at most 20 ms of the recording at twice its speed; beside it, one per message.
    assert np.median(np.diff(moving)) < 25e6
    assert 1.0e9 - 3e7 <= min(listener.stamps) - START_NS < max(listener.stamps) - START_NS <= 3.0e9
    assert len(listener.stamps) == 4 * 20


def test_loop_plays_again_from_the_start_until_interrupted(
    tmp_path: Path, drive: Path, rig: Rig, listener: Listener, recorder: Callable[..., subprocess.Popen[str]]
) -> None:
    recorder(tmp_path / "out", "/odometry")
    player = start(tmp_path, PLAYER, drive, "--rate", 8, "--duration", 2, "--loop", "--quiet")
    deadline = time.monotonic() + 30.0
    # Into the fourth pass: at the end of the third the player has counted it, and nobody has heard of the next.
    while len(listener.stamps) < 4 * 20 * 3 + 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    ended = stop(player)
    assert ended.returncode == 130, ended.stderr
    result = json.loads(ended.stdout)
    assert result["interrupted"]
    assert result["loops"] >= 2
    assert (np.diff(np.array(listener.clock)) < -1e9).sum() == result["loops"]


def test_nobody_listens(tmp_path: Path, drive: Path, rig: Rig) -> None:
    played = run(tmp_path, PLAYER, drive, "--wait", 0.5, "--quiet")
    assert played.returncode == 2
    assert "a subscriber is required on every input within" in played.stderr
    assert all(camera.topic in played.stderr for camera in rig.cameras)
    assert "Traceback" not in played.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rig", "autoware"), "does not fit the rig 'autoware'"),
        (("--rig", "none_such"), "no rig of this name; there are autoware, "),
        (("--rate", "0"), "rate must be within 0.01 .. 100, found 0.0"),
        (("--start-offset", "9"), "start offset 9.0 s is beyond the recording's 4."),
    ],
)
def test_bad_requests(tmp_path: Path, drive: Path, arguments: tuple[str, str], message: str) -> None:
    played = run(tmp_path, PLAYER, drive, "--wait", 0.2, "--quiet", *arguments)
    assert played.returncode == 2
    assert message in played.stderr
    assert "Traceback" not in played.stderr


def test_options_name_everything_that_is_wrong() -> None:
    with pytest.raises(BagError, match=r"rate must be .* 1000.*; start_offset_s must be .*; duration_s must be"):
        PlayOptions(Path("bag"), "sample", rate=1000.0, start_offset_s=-1.0, duration_s=0.0)


def test_missing_message_packages_are_named() -> None:
    assert message_class("sensor_msgs/msg/CompressedImage") is CompressedImage
    with pytest.raises(BagError, match="message type my_msgs/msg/Thing is required, its ROS package is not installed"):
        message_class("my_msgs/msg/Thing")
    with pytest.raises(BagError, match="message type std_msgs/msg/Thing is required"):
        message_class("std_msgs/msg/Thing")


@pytest.mark.parametrize(("offered", "durability", "depth"), [([], "VOLATILE", 5), (["1", "50"], "VOLATILE", 50)])
def test_publishers_are_reliable_and_as_deep_as_the_recording_says(
    tmp_path: Path, offered: list[str], durability: str, depth: int
) -> None:
    check_qos(tmp_path, [(int(text), QosDurability.VOLATILE) for text in offered], durability, depth)


def test_latched_topics_stay_latched(tmp_path: Path) -> None:
    check_qos(tmp_path, [(1, QosDurability.TRANSIENT_LOCAL)], "TRANSIENT_LOCAL", 5)


def check_qos(folder: Path, offered: list[tuple[int, QosDurability]], durability: str, depth: int) -> None:
    store = get_typestore(Stores.ROS2_JAZZY)
    forever = QosTime(9223372036, 854775807)
    profiles = [
        Qos(QosHistory.KEEP_LAST, deep, QosReliability.BEST_EFFORT, kind, forever, forever, QosLiveliness.AUTOMATIC,
            forever, False)
        for deep, kind in offered
    ]  # fmt: skip
    with Writer(folder / "bag", version=9) as writer:
        kind = "std_msgs/msg/String"
        connection = writer.add_connection("/navigation", kind, typestore=store, offered_qos_profiles=profiles)
        writer.write(connection, 1, store.serialize_cdr(store.types[kind](data="x"), kind))
    with open_bag(folder / "bag") as reader:
        found = publisher_qos(reader.connections[0])
    assert found.reliability == QoSReliabilityPolicy.RELIABLE
    assert (found.durability.name, found.depth) == (durability, depth)


def test_recorder_with_nothing_to_record_leaves_no_bag(tmp_path: Path) -> None:
    process = start(tmp_path, RECORDER, tmp_path / "out", "--prefix", "/nothing_here")
    deadline = time.monotonic() + 10.0
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    ended = stop(process, signal.SIGTERM)
    assert ended.returncode == 1, ended.stderr
    assert json.loads(ended.stdout) == {"messages": {}}
    assert not (tmp_path / "out").exists()


def test_recorder_does_not_overwrite(tmp_path: Path, drive: Path) -> None:
    taken = tmp_path / "taken"
    shutil.copytree(drive, taken)
    ended = run(tmp_path, RECORDER, taken, "--prefix", "/odometry")
    assert ended.returncode == 2
    assert "exists already" in ended.stderr
    assert by_topic(taken) == by_topic(drive)
