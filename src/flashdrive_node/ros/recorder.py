"""Records what a node publishes into a new rosbag2 (MCAP) that ``ros2 bag`` can play.

Topics are found by prefix as they appear and are subscribed to with the QoS that their publishers offer. Messages are
written as the bytes that arrive. Recording times are those of /clock, so that the new bag lines up with a bag that is
being played.

Run as a process of its own (``python -m flashdrive_node.ros.recorder OUT --prefix /flashdrive_node/``); it ends cleanly
on SIGINT or SIGTERM. One line of JSON per topic found on stdout, and one at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSDurabilityPolicy, QoSProfile, QoSReliabilityPolicy
from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError

from flashdrive_node.ros.player import message_class
from flashdrive_node.runtime.bag import BagError, definition

_DISCOVERY_PERIOD_S = 0.1
_DEPTH = 200
_FOREVER = QosTime(9223372036, 854775807)


class Recorder(Node):
    """Subscribes to every topic below the prefixes and writes what arrives."""

    def __init__(self, out: Path, prefixes: tuple[str, ...], use_sim_time: bool):
        super().__init__(
            "flashdrive_recorder",
            enable_rosout=False,
            start_parameter_services=False,
            parameter_overrides=[Parameter("use_sim_time", value=use_sim_time)],
        )
        self._prefixes = prefixes
        self._writer = Writer(out, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._connections: dict[str, Connection] = {}
        self._unclocked: list[tuple[Connection, bytes]] = []
        self._skipped: set[str] = set()
        # Timers of this node follow /clock; discovery must go on while the clock stands still.
        self.create_timer(_DISCOVERY_PERIOD_S, self._discover, clock=rclpy.clock.Clock())
        self._discover()

    @property
    def counts(self) -> dict[str, int]:
        """Messages written by topic."""
        return {topic: self._writer.counts[c.id] for topic, c in self._connections.items()}

    def close(self) -> int:
        """Finish the bag; returns the number of messages in it. A bag without messages is removed."""
        # /clock never came: the wall clock is the only time there is.
        for connection, raw in self._unclocked:
            self._writer.write(connection, time.time_ns(), raw)
        total = sum(self.counts.values())
        self._writer.close()
        if total == 0:
            shutil.rmtree(self._writer.path)
        return total

    def _discover(self) -> None:
        for topic, types in self.get_topic_names_and_types():
            if topic in self._connections or topic in self._skipped or not topic.startswith(self._prefixes):
                continue
            publishers = self.get_publishers_info_by_topic(topic)
            if not publishers:
                continue
            try:
                text, digest = definition(types[0], _share_directories())
                kind = message_class(types[0])
            except BagError as error:
                self._skipped.add(topic)
                print(f"flashdrive recorder: {topic} is left out: {error}", file=sys.stderr, flush=True)
                continue
            offered = publishers[0].qos_profile
            reliable = all(p.qos_profile.reliability == QoSReliabilityPolicy.RELIABLE for p in publishers)
            latched = all(p.qos_profile.durability == QoSDurabilityPolicy.TRANSIENT_LOCAL for p in publishers)
            profile = QoSProfile(
                depth=_DEPTH,
                reliability=QoSReliabilityPolicy.RELIABLE if reliable else QoSReliabilityPolicy.BEST_EFFORT,
                durability=QoSDurabilityPolicy.TRANSIENT_LOCAL if latched else QoSDurabilityPolicy.VOLATILE,
            )
            connection = self._writer.add_connection(
                topic,
                types[0],
                msgdef=text,
                rihs01=digest,
                offered_qos_profiles=[_bag_qos(reliable, latched, max(1, offered.depth))],
            )
            self._connections[topic] = connection
            self.create_subscription(kind, topic, partial(self._write, connection), profile, raw=True)
            print(json.dumps({"topic": topic, "type": types[0]}), flush=True)

    def _write(self, connection: Connection, raw: bytes) -> None:
        now_ns = self.get_clock().now().nanoseconds
        if now_ns == 0:
            self._unclocked.append((connection, bytes(raw)))
            return
        for early_connection, early in self._unclocked:
            self._writer.write(early_connection, now_ns, early)
        self._unclocked.clear()
        self._writer.write(connection, now_ns, bytes(raw))


def _share_directories() -> list[Path]:
    return [Path(p) / "share" for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]


def _bag_qos(reliable: bool, latched: bool, depth: int) -> Qos:
    return Qos(
        history=QosHistory.KEEP_LAST,
        depth=depth,
        reliability=QosReliability.RELIABLE if reliable else QosReliability.BEST_EFFORT,
        durability=QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        deadline=_FOREVER,
        lifespan=_FOREVER,
        liveliness=QosLiveliness.AUTOMATIC,
        liveliness_lease_duration=_FOREVER,
        avoid_ros_namespace_conventions=False,
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point of the recorder process: 0 something recorded, 1 nothing, 2 bad input."""
    parser = argparse.ArgumentParser(prog="flashdrive_recorder", description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--prefix", action="append", required=True, help="topic, or beginning of topics, to record")
    parser.add_argument("--wall-time", action="store_true", help="stamp with the system clock instead of /clock")
    args = parser.parse_args(argv)
    # The bag is finished after the executor has returned; rclpy's own handlers would take the node down first.
    rclpy.init(args=[], signal_handler_options=rclpy.signals.SignalHandlerOptions.NO)
    executor = SingleThreadedExecutor()
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        executor.wake()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        recorder = Recorder(args.out, tuple(args.prefix), use_sim_time=not args.wall_time)
    except (WriterError, OSError) as error:
        print(f"flashdrive recorder: {error}", file=sys.stderr)
        return 2
    executor.add_node(recorder)
    try:
        while not stopping:
            executor.spin_once(timeout_sec=0.2)
    except ExternalShutdownException:
        pass
    counts = recorder.counts
    total = recorder.close()
    print(json.dumps({"messages": counts}), flush=True)
    rclpy.try_shutdown()
    return 0 if total else 1


if __name__ == "__main__":
    sys.exit(main())
