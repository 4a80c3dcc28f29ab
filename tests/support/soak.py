"""A long drive in compressed time: simulated clock, as fast as the node answers, with losses, bursts and resets.

    PYTHONPATH=tests python -m support.soak --minutes 60

drives an hour (36,000 windows) and prints the table of memory, threads, descriptors and frames; tests/ros/test_soak.py
drives a few minutes of it.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import random
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from rclpy.serialization import serialize_message
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import String
from std_srvs.srv import Trigger

from support.node_process import Bench, NodeProcess, own_domain_id, wait_until
from support.observer import Observer
from support.painted_frames import paint_jpeg
from support.vehicle import Camera, to_time, write_rig

STEP_NS = 100_000_000
START_NS = 1_700_000_000_000_000_000
#: Different pictures per camera; they repeat, but never in successive frames.
PICTURES = 40
#: Windows that a reset costs: the ego history has to fill again.
REFILL_STEPS = 17
CAMERAS = (("cross_left", 0), ("front_wide", 1), ("cross_right", 2), ("front_tele", 6))


@dataclass(frozen=True)
class Chances:
    """How often, per frame or per window, something out of the ordinary happens."""

    loss: float = 0.01
    duplicate: float = 0.005
    corrupt: float = 0.002
    late: float = 0.005
    burst: float = 0.01
    reset: float = 0.002


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    windows: int
    memory_mb: float
    threads: int
    descriptors: int


@dataclass
class SoakReport:
    """What a drive showed."""

    windows: int = 0
    expected: int = 0
    answered: int = 0
    unanswered: list[int] = field(default_factory=list)
    wall_s: float = 0.0
    resets: int = 0
    published: dict[str, int] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    #: Values of every camera's last diagnostic status.
    cameras: dict[str, dict[str, str]] = field(default_factory=dict)

    def growth_mb(self) -> float:
        """Median memory of the last fifth less that of the fifth after the first: what a leak would make grow."""
        fifth = max(len(self.samples) // 5, 1)
        early, late = self.samples[fifth : 2 * fifth], self.samples[-fifth:]
        return _median([s.memory_mb for s in late]) - _median([s.memory_mb for s in early])

    def table(self) -> str:
        """Markdown."""
        first, last = self.samples[len(self.samples) // 5], self.samples[-1]
        lines = [
            f"{self.windows} windows ({self.windows / 600:.1f} min of driving) in {self.wall_s:.0f} s, "
            f"{self.resets} resets; {self.answered} of {self.expected} expected results",
            "",
            "| | after a fifth | at the end |",
            "|---|---|---|",
            f"| memory (RSS) | {first.memory_mb:.1f} MB | {last.memory_mb:.1f} MB ({self.growth_mb():+.1f} MB) |",
            f"| threads | {first.threads} | {last.threads} |",
            f"| descriptors | {first.descriptors} | {last.descriptors} |",
            "",
            "| camera | published | received | used | held | dropped by cause |",
            "|---|---|---|---|---|---|",
        ]
        for name, account in sorted(self.cameras.items()):
            frames = Frames.of(account)
            causes = ", ".join(f"{cause} {count}" for cause, count in sorted(frames.dropped.items()) if count)
            lines.append(
                f"| {name} | {self.published[name]} | {frames.received} | {frames.used} | {frames.held} | {causes} |"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Frames:
    """The account of one camera out of its diagnostic values."""

    received: int
    used: int
    held: int
    dropped: dict[str, int]

    @classmethod
    def of(cls, values: dict[str, str]) -> Frames:
        """Read ``received``, ``used``, ``held`` and every ``dropped_*``."""
        dropped = {key.removeprefix("dropped_"): int(v) for key, v in values.items() if key.startswith("dropped_")}
        return cls(int(values["received"]), int(values["used"]), int(values["held"]), dropped)

    @property
    def unaccounted(self) -> int:
        """Frames that came and are nowhere."""
        return self.received - self.used - self.held - sum(self.dropped.values())


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class _Stamped:
    """A serialised message whose header stamp is replaced: building images anew would be most of the work."""

    def __init__(self, message: Any):
        self.data = bytearray(serialize_message(message))

    def at(self, stamp_ns: int) -> bytes:
        # Behind the four bytes of encapsulation: int32 seconds, uint32 nanoseconds.
        struct.pack_into("<iI", self.data, 4, stamp_ns // 1_000_000_000, stamp_ns % 1_000_000_000)
        return bytes(self.data)


class Soak:
    """Drives a node in lock step: the next window's messages go out when the last one is answered."""

    def __init__(self, bench: Bench, node: NodeProcess, seed: int = 0, chances: Chances | None = None):
        self.bench, self.node = bench, node
        self.chances = chances or Chances()
        self.random = random.Random(seed)
        self.report = SoakReport(published=dict.fromkeys([name for name, _ in CAMERAS], 0))
        self.observer = Observer(bench, node, topics=())
        self._answers: set[int] = set()
        self._answered = threading.Condition()
        qos = QoSProfile(depth=20, reliability=QoSReliabilityPolicy.RELIABLE)
        create, inputs = bench.node.create_publisher, f"{node.full_name}/input"
        self.clock = create(Clock, "/clock", 10)
        self.odometry = create(Odometry, f"{inputs}/odometry", 50)
        self.images = {name: create(CompressedImage, f"{inputs}/{name}/image/compressed", qos) for name, _ in CAMERAS}
        bench.node.create_subscription(String, f"{node.full_name}/output/record", self._on_record, 100)
        self.pictures = {
            name: [_Stamped(self._picture(index, number)) for number in range(PICTURES)] for name, index in CAMERAS
        }
        self.corrupt = _Stamped(
            CompressedImage(format="jpeg", data=array.array("B", b"\xff\xd8\xff\xe0 not a picture"))
        )
        #: Per camera the frame that was held back to arrive after its successor.
        self.late: dict[str, bytes | None] = dict.fromkeys(self.images)

    @staticmethod
    def _picture(index: int, number: int) -> CompressedImage:
        return CompressedImage(format="jpeg", data=array.array("B", paint_jpeg(index, number, 160, 96)))

    def _on_record(self, message: String) -> None:
        t0_ns = int(json.loads(message.data)["t0_ns"])
        with self._answered:
            self._answers.add(t0_ns)
            self._answered.notify_all()

    def run(self, windows: int, timeout_s: float = 5.0) -> SoakReport:
        """Drive so many windows."""
        report, chances = self.report, self.chances
        wait_until(lambda: all(p.get_subscription_count() for p in self.images.values()), 20.0, "subscriptions")
        self.observer.wait(lambda: self.observer.find("inference"), 20.0, "diagnostics")
        process = self.node.usage()
        started_s, complete, burst = time.monotonic(), -REFILL_STEPS, 0
        every = max(windows // 100, 1)
        for i in range(windows):
            stamp_ns = START_NS + i * STEP_NS
            if self.random.random() < chances.reset:
                answer = self.bench.call(Trigger, f"{self.node.full_name}/reset", Trigger.Request())
                assert answer.success, answer.message
                report.resets += 1
                self.late = dict.fromkeys(self.late)
                complete = -REFILL_STEPS
            good = self._publish(i, stamp_ns)
            complete += 1
            if not good:
                # A frame that is missing spoils this window and the three after it.
                complete = min(complete, -3)
            burst = burst - 1 if burst else (self.random.randrange(2, 4) if self.random.random() < chances.burst else 0)
            if complete > 0 and not burst:
                report.expected += 1
                if self._wait(stamp_ns, timeout_s):
                    report.answered += 1
                else:
                    report.unanswered.append(i)
            elif complete <= 0:
                time.sleep(0.002)
            with self._answered:  # answers come from another thread, and none may be lost
                self._answers = {t0 for t0 in self._answers if t0 > stamp_ns - 20 * STEP_NS}
            del self.observer.statuses[:-50]
            if i % every == every - 1:
                self._measure(process, i + 1)
        report.windows, report.wall_s = windows, time.monotonic() - started_s
        self._settle(stamp_ns)
        return report

    def _publish(self, i: int, stamp_ns: int) -> bool:
        """The messages of one step; False where a frame is missing for now or for good."""
        good = True
        self.clock.publish(Clock(clock=to_time(stamp_ns)))
        for half in (1, 0):
            at_ns = stamp_ns - half * STEP_NS // 2
            self.odometry.publish(_odometry(at_ns))
        for name, publisher in self.images.items():
            picture = self.pictures[name][i % PICTURES].at(stamp_ns)
            late, self.late[name] = self.late[name], None
            dice, chances = self.random.random(), self.chances
            if dice < chances.loss:
                good = False
            elif dice < chances.loss + chances.corrupt:
                self._send(name, publisher, self.corrupt.at(stamp_ns))
                good = False
            elif dice < chances.loss + chances.corrupt + chances.late and late is None:
                self.late[name] = picture
                good = False
            else:
                self._send(name, publisher, picture)
                if self.random.random() < chances.duplicate:
                    self._send(name, publisher, picture)
            if late is not None:
                self._send(name, publisher, late)
        return good

    def _send(self, name: str, publisher: Any, data: bytes) -> None:
        publisher.publish(data)
        self.report.published[name] += 1

    def _wait(self, stamp_ns: int, timeout_s: float) -> bool:
        with self._answered:
            return self._answered.wait_for(lambda: stamp_ns in self._answers, timeout_s)

    def _measure(self, process: Any, windows: int) -> None:
        with process.oneshot():
            memory_mb = process.memory_info().rss / 1e6
            self.report.samples.append(Sample(windows, memory_mb, process.num_threads(), process.num_fds()))

    def _settle(self, stamp_ns: int) -> None:
        """Wait for diagnostics that count everything that was published."""

        def counted() -> bool:
            for name, _ in CAMERAS:
                status = self.observer.find(name, since_s)
                if status is None:
                    return False
                self.report.cameras[name] = status.values
            return True

        # The node's timers stand still with /clock.
        deadline_s, since_s = time.monotonic() + 10.0, time.monotonic() + 0.5
        while not counted():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no diagnostics of all cameras\n{self.observer.report()}")
            stamp_ns += STEP_NS // 10
            self.clock.publish(Clock(clock=to_time(stamp_ns)))
            time.sleep(0.02)


def _odometry(stamp_ns: int) -> Odometry:
    speed = 10.0
    message = Odometry(child_frame_id="base_link")
    message.header.stamp, message.header.frame_id = to_time(stamp_ns), "odom"
    message.pose.pose.position.x = speed * (stamp_ns - START_NS) / 1e9
    message.pose.pose.orientation.w = 1.0
    message.twist.twist.linear.x = speed
    return message


def drive(folder: Path, windows: int, seed: int = 0) -> SoakReport:
    """Start a node with the fake engine and drive so many windows."""
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("ROS_LOG_DIR", str(folder / "ros_log"))
    rig = write_rig(folder, [Camera(name, index, width=160, height=96) for name, index in CAMERAS])
    parameters = {
        "engine": "fake",
        "fake.latency_s": 0.0,
        "rig": rig,
        "use_sim_time": True,
        "auto_activate": True,
        "diagnostics_period_s": 0.5,
    }
    bench = Bench(own_domain_id(), "soak")
    try:
        with NodeProcess(bench, folder, parameters) as node:
            return Soak(bench, node, seed).run(windows)
    finally:
        bench.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Drive for a long time in compressed time and print what it cost.")
    parser.add_argument("--minutes", type=float, default=60.0, help="simulated driving time (default: an hour)")
    parser.add_argument("--seed", type=int, default=0, help="seed of losses, bursts and resets")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = drive(Path(folder), round(arguments.minutes * 600), arguments.seed)
    print(report.table())
    print(f"unanswered windows: {report.unanswered or 'none'}")


if __name__ == "__main__":
    main()
