"""Plays a rosbag2 recording over DDS without a ROS install, with /clock, at any rate.

Messages go out as the bytes that the bag holds: nothing is deserialised. /clock is published just before every message
as well as at a fixed rate, so that no node sees a stamp from its future, also at high rates.

Run as a process of its own (``python -m flashdrive_node.ros.player BAG --rig NAME``): a progress bar on stderr, and one
line of JSON (:class:`PlayResult`) on stdout at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rclpy
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSDurabilityPolicy, QoSHistoryPolicy, QoSProfile, QoSReliabilityPolicy
from rosbags.interfaces import Connection, QosDurability
from rosgraph_msgs.msg import Clock as ClockMessage

from flashdrive_node.runtime.bag import BagError, messages, open_bag, select
from flashdrive_node.runtime.rig import RigError, load_rig

#: Of commands that take as long as a recording.
PROGRESS_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} s of the recording [{elapsed}<{remaining}]"
#: Called with the bag time since the start of the recording in seconds.
OnProgress = Callable[[float], None]


@dataclass(frozen=True)
class PlayOptions:
    """What to play and how."""

    bag: Path
    #: Name or path of the rig whose topics are played.
    rig: str
    #: Bag seconds per second.
    rate: float = 1.0
    loop: bool = False
    start_offset_s: float = 0.0
    #: None plays to the end.
    duration_s: float | None = None
    clock_hz: float = 100.0
    #: How long to wait until every camera and odometry topic has a subscriber.
    wait_s: float = 30.0
    #: How long /clock runs on after the last message, in wall time.
    tail_s: float = 0.5

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {rule}, found {value!r}"
            for name, value, rule, ok in (
                ("rate", self.rate, "within 0.01 .. 100", 0.01 <= self.rate <= 100.0),
                ("start_offset_s", self.start_offset_s, "at least 0 s", self.start_offset_s >= 0.0),
                ("duration_s", self.duration_s, "more than 0 s", self.duration_s is None or self.duration_s > 0.0),
                ("clock_hz", self.clock_hz, "within 1 .. 1000 Hz", 1.0 <= self.clock_hz <= 1000.0),
            )
            if not ok
        ]
        if problems:
            raise BagError("; ".join(problems))


@dataclass
class PlayResult:
    """What was played."""

    messages: dict[str, int] = field(default_factory=dict)
    loops: int = 0
    #: Where playing started, seconds after the start of the recording.
    start_offset_s: float = 0.0
    #: Bag time played, without repetitions of a loop, and wall time taken.
    played_s: float = 0.0
    wall_s: float = 0.0
    #: How late messages left, against the wall clock.
    late_mean_ms: float = 0.0
    late_max_ms: float = 0.0
    interrupted: bool = False


def message_class(message_type: str) -> Any:
    """The rclpy class of a type such as ``sensor_msgs/msg/Image``.

    Raises:
        BagError: The message package is not installed.
    """
    package, _, name = message_type.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), name)
    except (ImportError, AttributeError) as error:
        raise BagError(f"message type {message_type} is required, its ROS package is not installed: {error}") from error


def play(node: Node, options: PlayOptions, on_progress: OnProgress | None = None) -> PlayResult:
    """Play a recording once, or until interrupted with ``loop``.

    Raises:
        BagError: The recording is unreadable or does not fit the rig, or nobody subscribes within ``wait_s``.
    """
    rig = load_rig(options.rig)
    with open_bag(options.bag) as reader:
        connections = select(reader, rig)
        start = reader.start_time + round(options.start_offset_s * 1e9)
        if start >= reader.end_time:
            raise BagError(
                f"{options.bag}: start offset {options.start_offset_s} s is beyond the recording's "
                f"{reader.duration / 1e9:.3f} s"
            )
        stop = None if options.duration_s is None else start + round(options.duration_s * 1e9)
        publishers = {
            c.id: node.create_publisher(message_class(c.msgtype), c.topic, publisher_qos(c)) for c in connections
        }
        clock = _ClockPublisher(node, options.clock_hz)
        required = [rig.odometry_topic, *(camera.topic for camera in rig.cameras)]
        waited = [publishers[c.id] for c in connections if c.topic in required]
        _wait_for_subscribers(waited, clock, start, options.wait_s)
        result = PlayResult(messages={c.topic: 0 for c in connections}, start_offset_s=options.start_offset_s)
        began = time.monotonic()
        try:
            while True:
                end = _play_once(
                    messages(reader, connections, start, stop), publishers, clock, start, options, result, on_progress
                )
                if not options.loop:
                    break
                result.loops += 1
            clock.run(end, options.tail_s, options.rate)
            for publisher in waited:
                publisher.wait_for_all_acked(Duration(seconds=1.0))
        except (KeyboardInterrupt, ExternalShutdownException):
            result.interrupted = True
        result.wall_s = time.monotonic() - began
        sent = sum(result.messages.values())
        result.late_mean_ms = result.late_mean_ms / max(sent, 1)
        return result


def _play_once(
    stream: Any,
    publishers: dict[int, Publisher],
    clock: _ClockPublisher,
    start_ns: int,
    options: PlayOptions,
    result: PlayResult,
    on_progress: OnProgress | None,
) -> int:
    """Publish one pass of the recording; returns the bag time of its last message."""
    wall_start = time.monotonic()
    stamp = start_ns
    clock.restart()
    for connection, stamp, raw in stream:
        due = wall_start + (stamp - start_ns) / 1e9 / options.rate
        clock.run_until(due, stamp, options.rate)
        clock.publish(stamp)
        publishers[connection.id].publish(bytes(raw))
        late_ms = max(0.0, time.monotonic() - due) * 1e3
        result.late_mean_ms += late_ms
        result.late_max_ms = max(result.late_max_ms, late_ms)
        result.messages[connection.topic] += 1
        result.played_s = max(result.played_s, (stamp - start_ns) / 1e9)
        if on_progress is not None:
            on_progress((stamp - start_ns) / 1e9)
    return stamp


class _ClockPublisher:
    """/clock: at a fixed wall rate in between messages, and whenever told."""

    def __init__(self, node: Node, rate_hz: float):
        self._node = node
        self._publisher = node.create_publisher(ClockMessage, "/clock", QoSProfile(depth=10))
        self._period_s = 1.0 / rate_hz
        self._message = ClockMessage()
        self._last_ns = -1

    def restart(self) -> None:
        """Allow the time to go back, at the start of a loop."""
        self._last_ns = -1

    def publish(self, stamp_ns: int) -> None:
        """Publish a time unless it is not newer than the last one."""
        if stamp_ns <= self._last_ns:
            return
        self._last_ns = stamp_ns
        self._message.clock.sec, self._message.clock.nanosec = divmod(stamp_ns, 1_000_000_000)
        self._publisher.publish(self._message)

    def run_until(self, due_s: float, stamp_ns: int, rate: float) -> None:
        """Sleep until a monotonic time at which the bag time is ``stamp_ns``, publishing times that lead up to it."""
        while True:
            if not self._node.context.ok():
                raise ExternalShutdownException
            remaining = due_s - time.monotonic()
            if remaining <= 0:
                return
            time.sleep(min(remaining, self._period_s))
            remaining = due_s - time.monotonic()
            if remaining > 0:
                self.publish(stamp_ns - round(remaining * rate * 1e9))

    def run(self, from_ns: int, seconds: float, rate: float) -> None:
        """Let the time run on for some seconds of the wall clock."""
        self.run_until(time.monotonic() + seconds, from_ns + round(seconds * rate * 1e9), rate)


def _wait_for_subscribers(publishers: list[Publisher], clock: _ClockPublisher, start_ns: int, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while missing := [p.topic_name for p in publishers if p.get_subscription_count() == 0]:
        if time.monotonic() > deadline:
            raise BagError(f"a subscriber is required on every input within {wait_s:.0f} s, found none on {missing}")
        # Nodes on simulated time must leave time zero before the first message, or they see a jump on it.
        clock.restart()
        clock.publish(start_ns)
        time.sleep(0.05)


def publisher_qos(connection: Connection) -> QoSProfile:
    """Reliable, which every subscriber accepts; latched topics stay latched, and the depth is at least the bag's."""
    offered = getattr(connection.ext, "offered_qos_profiles", [])
    latched = any(q.durability == QosDurability.TRANSIENT_LOCAL for q in offered)
    depth = max([5, *(min(q.depth, 100) for q in offered)])
    return QoSProfile(
        history=QoSHistoryPolicy.KEEP_LAST,
        depth=depth,
        reliability=QoSReliabilityPolicy.RELIABLE,
        durability=QoSDurabilityPolicy.TRANSIENT_LOCAL if latched else QoSDurabilityPolicy.VOLATILE,
    )


def _parse(argv: list[str]) -> tuple[PlayOptions, bool]:
    parser = argparse.ArgumentParser(prog="flashdrive_player", description=__doc__.split("\n", 1)[0])
    parser.add_argument("bag", type=Path)
    parser.add_argument("--rig", default="sample")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--loop", action="store_true")
    parser.add_argument("--start-offset", type=float, default=0.0, dest="start_offset_s")
    parser.add_argument("--duration", type=float, default=None, dest="duration_s")
    parser.add_argument("--clock-hz", type=float, default=100.0)
    parser.add_argument("--wait", type=float, default=30.0, dest="wait_s")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = vars(parser.parse_args(argv))
    quiet = args.pop("quiet")
    return PlayOptions(**args), quiet


def main(argv: list[str] | None = None) -> int:
    """Entry point of the player process: 0 played, 2 bad input, 130 interrupted."""
    from tqdm import tqdm

    try:
        options, quiet = _parse(sys.argv[1:] if argv is None else argv)
        with open_bag(options.bag) as reader:
            total = reader.duration / 1e9 - options.start_offset_s
        total = min(total, options.duration_s or total)
        rclpy.init(args=[])
        node = Node("flashdrive_player", enable_rosout=False, start_parameter_services=False)
        with tqdm(total=round(total, 1), unit="s", disable=quiet, desc="replay", bar_format=PROGRESS_BAR) as bar:

            def show(played_s: float) -> None:
                bar.n = round(played_s, 1)
                bar.update(0)

            result = play(node, options, show)
    except (BagError, RigError) as error:
        print(f"flashdrive player: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        rclpy.try_shutdown()
    print(json.dumps(dataclasses.asdict(result)), flush=True)
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
