"""What can be done to a driving node, and how one row of the fault table is played."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nav_msgs.msg import Odometry
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from support.malformed import publish_malformed
from support.node_process import Bench, NodeProcess
from support.observer import ERROR, OK, Observer, Status
from support.vehicle import Fault, ImageMessage, Vehicle, to_ns, to_time

NOTHING = "nothing"
GOES_ON = "goes on"
#: The camera with compressed images and the one with raw images, which is also the reference for t0.
COMPRESSED, RAW = "left", "front"
#: Width and height of the test's images, pixels.
SIZE = (160, 96)


@dataclass
class Scene:
    """A healthy node that drives, and the means to disturb it."""

    bench: Bench
    node: NodeProcess
    vehicle: Vehicle
    observer: Observer

    def settle(self, timeout_s: float = 15.0) -> None:
        """Wait until results flow and the diagnostics say so."""
        start_s = time.monotonic()
        self.observer.wait_count(2, timeout_s=timeout_s)
        self.observer.wait_status("inference", OK, timeout_s=timeout_s, since_s=start_s)

    def windows(self) -> int:
        """Windows that the node has counted since it was started."""
        status = self.observer.find("inference")
        assert status is not None
        return int(status.values["windows"])

    def resets(self) -> int:
        """Resets of all causes that the node has counted."""
        status = self.observer.find("inference")
        assert status is not None
        return sum(int(value) for key, value in status.values.items() if key.startswith("reset_"))


@dataclass(frozen=True)
class Says:
    """One expected diagnostic; "..." in the text stands for figures and stamps."""

    status: str
    level: str
    text: str

    @property
    def pattern(self) -> str:
        """Regular expression of the text."""
        return ".*".join(re.escape(part.strip()) for part in self.text.split("..."))


@dataclass(frozen=True)
class FaultRow:
    """One fault."""

    fault: str
    published: str
    says: tuple[Says, ...]
    recovers: str
    inject: Callable[[Scene], Any]
    clear: Callable[[Scene], Any] = lambda scene: None
    #: Whether the stream must survive: no reset, neither by the fault nor by its end.
    keeps_stream: bool = False
    #: Time after the diagnostic in which nothing may be published (or after which it must go on).
    watch_s: float = 0.5

    @property
    def id(self) -> str:
        """Name of the test."""
        return re.sub(r"[^a-z0-9]+", "_", self.fault.lower()).strip("_")


def play(row: FaultRow, scene: Scene) -> list[Status]:
    """Run one row against a node; the statuses that were found.

    Raises:
        AssertionError, TimeoutError: The node did not do what the table says.
    """
    observer = scene.observer
    scene.settle()
    since_s, resets = time.monotonic(), scene.resets()
    try:
        row.inject(scene)
        found = [observer.wait_status(s.status, s.level, s.pattern, since_s=since_s) for s in row.says]
        if row.published == GOES_ON:
            observer.wait_count(2, timeout_s=5.0)
        elif row.watch_s:
            # Whatever was under way when the fault was noticed has come out by then.
            time.sleep(0.15)
            before = observer.count()
            time.sleep(row.watch_s)
            assert observer.count() == before, f"published during {row.fault!r}\n{observer.report()}"
    finally:
        row.clear(scene)
    scene.settle()
    assert scene.node.running(), scene.node.output[-3000:]
    if row.keeps_stream:
        assert scene.resets() == resets, f"{row.fault!r} reset the stream\n{observer.report()}"
    return found


def markdown(rows: Sequence[FaultRow]) -> str:
    """The table of the documentation."""
    lines = [
        "# Faults",
        "",
        "What the node does when something goes wrong. On a fault it publishes nothing and says why; it never invents",
        "motion, so the vehicle's own fallback must act on missing output. Every row is a test that runs the node as a",
        "process (`tests/ros/test_fault_table.py`); figures and stamps in the messages are shown as `...`.",
        "",
        "| fault | outputs | diagnostic | level | message | recovers |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for i, says in enumerate(row.says):
            head = (row.fault, row.published) if i == 0 else ("", "")
            tail = row.recovers if i == 0 else ""
            text = says.text.replace("|", "\\|")
            lines.append(f"| {head[0]} | {head[1]} | {says.status} | {says.level} | `{text}` | {tail} |")
    return "\n".join(lines) + "\n"


def silent(message: ImageMessage, number: int) -> None:
    return None


def frozen() -> Fault:
    """Repeats the first picture under the stamps of the others."""
    kept: list[Any] = []

    def fault(message: ImageMessage, number: int) -> ImageMessage:
        kept.append(message.data)
        message.data = kept[0]
        return message

    return fault


def truncated(message: ImageMessage, number: int) -> ImageMessage:
    message.data = message.data[: len(message.data) // 3]
    return message


def wrong_encoding(message: ImageMessage, number: int) -> ImageMessage:
    message.encoding = "rgb13"
    return message


def wrong_step(message: ImageMessage, number: int) -> ImageMessage:
    message.step = message.width * 3 - 5
    return message


def stamp_fixed() -> Fault:
    """The driver stamps every frame with the time of the first one."""
    first: list[Any] = []

    def fault(message: ImageMessage, number: int) -> ImageMessage:
        first.append(message.header.stamp)
        message.header.stamp = first[0]
        return message

    return fault


def stamps_run_backwards() -> Fault:
    """Every stamp lies before the last one, by a tenth of the time that passed."""
    first: list[int] = []

    def fault(message: ImageMessage, number: int) -> ImageMessage:
        first.append(to_ns(message.header.stamp))
        message.header.stamp = to_time(first[0] - (first[-1] - first[0]) // 10)
        return message

    return fault


def not_finite(message: Odometry) -> Odometry:
    message.pose.pose.position.y = math.nan
    return message


def teleported(message: Odometry) -> Odometry:
    message.pose.pose.position.x += 50.0
    return message


def damage(camera: str, fault: Callable[[], Fault]) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.vehicle.cameras[camera].fault = fault()

    return inject


def heal(scene: Scene) -> None:
    for camera in scene.vehicle.cameras.values():
        camera.fault = None
        camera.width, camera.height = SIZE
    scene.vehicle.odometry_fault = None


def second_driver(scene: Scene) -> None:
    """Four further frames between any two, as if the rig knew the wrong rate or two drivers published."""
    camera = scene.vehicle.cameras[COMPRESSED]

    def fault(message: ImageMessage, number: int) -> ImageMessage:
        scene.vehicle.publish_image(COMPRESSED, message)
        stamp_ns = to_ns(message.header.stamp)
        for i in range(1, 4):
            scene.vehicle.publish_image(COMPRESSED, camera.message(number, stamp_ns + i * 20_000_000))
        return camera.message(number, stamp_ns + 80_000_000)

    camera.fault = fault


def resize(scene: Scene) -> None:
    scene.vehicle.cameras[COMPRESSED].width, scene.vehicle.cameras[COMPRESSED].height = SIZE[0] * 2, SIZE[1] * 2


def odometry(fault: Callable[[Odometry], Odometry | None]) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.vehicle.odometry_fault = fault

    return inject


def odometry_gap(scene: Scene) -> None:
    scene.vehicle.odometry_fault = lambda message: None
    time.sleep(0.6)
    scene.vehicle.odometry_fault = None


def jump(seconds: float) -> Callable[[Scene], None]:
    return lambda scene: scene.vehicle.jump(seconds)


def fake(fault: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        refused = scene.node.set_parameters(fake__fault=fault)
        assert refused == [], refused

    return inject


def stop_playback(scene: Scene) -> None:
    """The player pauses: neither messages nor /clock."""
    scene.vehicle.pause()
    # Longer than a gap that resets the stream, had it been one of the recorded time.
    time.sleep(1.2)


def resume_playback(scene: Scene) -> None:
    """The player goes on."""
    scene.vehicle.resume()


def results_too_old(limit_s: float, fault: str) -> Callable[[Scene], None]:
    """Results may be ``limit_s`` old at most, and the engine has this fault."""

    def inject(scene: Scene) -> None:
        refused = scene.node.set_parameters(max_result_age_s=limit_s, fake__fault=fault)
        assert refused == [], refused

    return inject


def navigate(text: str) -> Callable[[Scene], None]:
    return lambda scene: scene.vehicle.navigate(text)


def kill_and_restart(scene: Scene) -> None:
    """Until the new process speaks; its first words may be said before discovery lets anybody hear them."""
    scene.node.kill()
    before = scene.windows()
    scene.node.start()
    scene.observer.wait(lambda: scene.windows() < before, 20.0, "diagnostics of the new process")
    status = scene.observer.find("inference")
    assert status is not None
    assert status.values["last_reset"] == "activated", "the new process did not begin with its activation"
    assert scene.resets() == 1, scene.observer.report()


def activate_again(scene: Scene) -> None:
    assert scene.node.state() == "active"
    assert not scene.node.change("activate"), "a second activation was accepted"
    assert scene.node.state() == "active"


def malformed(scene: Scene) -> None:
    name = scene.node.full_name
    topics = {f"{name}/input/{camera.topic}": camera.message_type for camera in scene.vehicle.cameras.values()}
    topics |= {f"{name}/input/odometry": Odometry, f"{name}/input/navigation": String}
    before = scene.observer.count()
    assert publish_malformed(scene.bench, topics, scene.vehicle.now_ns, count=1000) == 1000
    assert scene.observer.count() > before, "nothing was published between malformed messages"


def reset_service(scene: Scene) -> None:
    answer = scene.bench.call(Trigger, f"{scene.node.full_name}/reset", Trigger.Request())
    assert answer.success, answer.message


def reset_while_hanging(scene: Scene) -> None:
    """A window is under way when the reset comes, and ends after it."""
    since_s = time.monotonic()
    fake("hang")(scene)
    scene.observer.wait_status("inference", ERROR, "hanging", since_s=since_s)
    before = scene.observer.count()
    reset_service(scene)
    fake("none")(scene)
    time.sleep(0.6)
    assert scene.observer.count() == before, "the result of a window from before the reset was published"


def pause(value: bool) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        answer = scene.bench.call(SetBool, f"{scene.node.full_name}/pause", SetBool.Request(data=value))
        assert answer.success, answer.message

    return inject
