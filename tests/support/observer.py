"""Collects what a node publishes, with the moment of arrival."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseArray
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import QoSProfile
from std_msgs.msg import String
from trajectory_msgs.msg import MultiDOFJointTrajectory
from visualization_msgs.msg import MarkerArray

from support.node_process import Bench, NodeProcess

OK, WARN, ERROR, STALE = "OK", "WARN", "ERROR", "STALE"
_LEVELS = {
    DiagnosticStatus.OK: OK,
    DiagnosticStatus.WARN: WARN,
    DiagnosticStatus.ERROR: ERROR,
    DiagnosticStatus.STALE: STALE,
}
OUTPUTS: dict[str, Any] = {
    "output/path": PathMessage,
    "output/trajectory": MultiDOFJointTrajectory,
    "output/trajectory_samples": PoseArray,
    "output/reasoning": String,
    "output/record": String,
    "debug/markers": MarkerArray,
    "debug/timing": DiagnosticArray,
}
#: Enough for most tests, and cheap to receive.
BASIC = ("output/path", "output/record")


@dataclass(frozen=True)
class Received:
    """One message of an output."""

    message: Any
    #: ``time.monotonic()`` when it came.
    at_s: float


@dataclass(frozen=True)
class Status:
    """One diagnostic status."""

    name: str
    level: str
    text: str
    values: dict[str, str]
    #: ``time.monotonic()`` when it came: equal for all statuses of one message.
    at_s: float


class Observer:
    """Subscribes to the outputs of one node and to /diagnostics."""

    def __init__(self, bench: Bench, node: NodeProcess, topics: tuple[str, ...] = BASIC):
        self.node = node
        self.outputs: dict[str, list[Received]] = {topic: [] for topic in topics}
        self.statuses: list[Status] = []
        self._changed = threading.Condition()
        self._ros = bench.node
        self._subscriptions = [
            bench.node.create_subscription(
                OUTPUTS[topic], f"{node.full_name}/{topic}", self._storer(topic), QoSProfile(depth=100)
            )
            for topic in topics
        ]
        self._subscriptions.append(
            bench.node.create_subscription(DiagnosticArray, "/diagnostics", self._diagnose, QoSProfile(depth=100))
        )

    def close(self) -> None:
        """Leave the topics."""
        for subscription in self._subscriptions:
            self._ros.destroy_subscription(subscription)

    def _storer(self, topic: str) -> Callable[[Any], None]:
        def store(message: Any) -> None:
            with self._changed:
                self.outputs[topic].append(Received(message, time.monotonic()))
                self._changed.notify_all()

        return store

    def _diagnose(self, message: DiagnosticArray) -> None:
        at_s = time.monotonic()
        with self._changed:
            for status in message.status:
                if status.name.startswith(self.node.full_name.strip("/") + ":"):
                    values = {pair.key: pair.value for pair in status.values}
                    self.statuses.append(Status(status.name, _LEVELS[status.level], status.message, values, at_s))
            self._changed.notify_all()

    def wait(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """The first true value of ``condition``, which is tried whenever something arrives.

        Raises:
            TimeoutError: Says what was waited for, the last diagnostics and the end of the node's log.
            RuntimeError: The same, where the node is no longer there.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not (value := condition()):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"waited {timeout_s:g} s for {what}\n{self.report()}")
                if not self.node.running():
                    raise RuntimeError(f"the node ended while waiting for {what}\n{self.report()}")
                self._changed.wait(min(left_s, 0.5))
        return value

    def report(self) -> str:
        """Latest diagnostics and the end of the log, for error messages."""
        lines = [f"{s.level:5} {s.name}: {s.text} {s.values}" for s in self.latest().values()]
        counts = {topic: len(messages) for topic, messages in self.outputs.items()}
        return "\n".join([f"received: {counts}", *lines, "-- log --", self.node.output[-2500:]])

    def latest(self) -> dict[str, Status]:
        """The newest status by name."""
        return {status.name: status for status in self.statuses}

    def find(self, name: str, since_s: float = 0.0) -> Status | None:
        """The newest status whose name ends with ``name``."""
        for status in reversed(self.statuses):
            if status.at_s < since_s:
                return None
            if status.name.endswith(name):
                return status
        return None

    def wait_status(
        self, name: str, level: str, text: str = "", timeout_s: float = 10.0, since_s: float = 0.0
    ) -> Status:
        """Wait for a status of this name (its end), level and text (a regular expression)."""

        def found() -> Status | None:
            for status in reversed(self.statuses):
                if status.at_s < since_s:
                    return None
                if status.name.endswith(name) and status.level == level and re.search(text, status.text):
                    return status
            return None

        return self.wait(found, timeout_s, f"diagnostic {name!r} {level} /{text}/")

    def count(self, topic: str = "output/path") -> int:
        """Messages of a topic so far."""
        return len(self.outputs[topic])

    def wait_count(self, more: int, topic: str = "output/path", timeout_s: float = 10.0) -> list[Received]:
        """Wait for so many further messages of a topic; they are returned."""
        start = self.count(topic)
        self.wait(lambda: self.count(topic) >= start + more, timeout_s, f"{more} further messages of {topic}")
        return self.outputs[topic][start:]

    def records(self, since_s: float = 0.0) -> list[dict[str, Any]]:
        """The parsed reasoning records."""
        return [json.loads(r.message.data) for r in list(self.outputs["output/record"]) if r.at_s >= since_s]
