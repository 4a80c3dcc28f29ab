"""A simulated vehicle: cameras with painted frames, odometry and navigation text, and every fault they can have.

The schedule runs in a thread of the test; stamps are those of the system clock, or of the /clock that the vehicle
publishes itself. A fault is a function put into ``Camera.fault`` or ``Vehicle.odometry_fault``: it gets the message
that is about to be published and returns it, changed or not, or None to publish nothing.
"""

from __future__ import annotations

import array
import heapq
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import yaml
from builtin_interfaces.msg import Time
from nav_msgs.msg import Odometry
from rclpy.qos import QoSProfile, QoSReliabilityPolicy, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from support.node_process import Bench
from support.painted_frames import paint, paint_jpeg

IMAGE_QOS = QoSProfile(depth=10, reliability=QoSReliabilityPolicy.RELIABLE)
#: How often /clock is published beside the messages, seconds of wall time.
CLOCK_PERIOD_S = 0.02
ImageMessage: TypeAlias = CompressedImage | Image
Fault: TypeAlias = Callable[[ImageMessage, int], ImageMessage | None]


def to_time(stamp_ns: int) -> Time:
    """Nanoseconds as a message stamp."""
    return Time(sec=stamp_ns // 1_000_000_000, nanosec=stamp_ns % 1_000_000_000)


def to_ns(stamp: Time) -> int:
    """A message stamp in nanoseconds."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


@dataclass(frozen=True)
class Delivered:
    """One frame that was published."""

    number: int
    stamp_ns: int
    #: ``time.monotonic()`` when it was handed to the middleware.
    published_s: float


@dataclass
class Camera:
    """One simulated camera."""

    name: str
    index: int
    rate_hz: float = 10.0
    #: Constant offset against the other cameras, seconds.
    skew_s: float = 0.0
    #: Largest deviation of the moment of exposure, seconds either side.
    jitter_s: float = 0.0
    #: Largest time from exposure to publication, seconds.
    delay_s: float = 0.0
    #: Share of frames that never arrive.
    loss: float = 0.0
    #: Share of frames that arrive after their successor.
    reorder: float = 0.0
    transport: str = "compressed"
    width: int = 320
    height: int = 192
    fault: Fault | None = None
    #: Everything published without a fault that changed it, by stamp.
    delivered: dict[int, Delivered] = field(default_factory=dict)

    @property
    def topic(self) -> str:
        """Name under the node's ``~/input/``."""
        return f"{self.name}/image" + ("/compressed" if self.transport == "compressed" else "")

    @property
    def message_type(self) -> type:
        """Type of the messages on ``topic``."""
        return CompressedImage if self.transport == "compressed" else Image

    def message(self, number: int, stamp_ns: int) -> ImageMessage:
        """The painted frame as the camera's driver would publish it."""
        if self.transport == "compressed":
            compressed = CompressedImage(format="jpeg")
            compressed.header.stamp, compressed.header.frame_id = to_time(stamp_ns), self.name
            compressed.data = array.array("B", paint_jpeg(self.index, number, self.width, self.height))
            return compressed
        raw = Image(encoding="rgb8", width=self.width, height=self.height, step=self.width * 3)
        raw.header.stamp, raw.header.frame_id = to_time(stamp_ns), self.name
        raw.data = array.array("B", paint(self.index, number, self.width, self.height).tobytes())
        return raw


def write_rig(folder: Path, cameras: Sequence[Camera], fixed_size: bool = True) -> Path:
    """Rig file of these cameras, for the node's parameter ``rig``."""
    entries = []
    for camera in cameras:
        size = {"width": camera.width, "height": camera.height} if fixed_size else {}
        known = {"name": camera.name, "index": camera.index, "transport": camera.transport, "rate_hz": camera.rate_hz}
        entries.append(known | size | {"topic": f"/test/{camera.topic}"})
    document = {
        "name": "test",
        "cameras": entries,
        "odometry_topic": "/test/odometry",
        "navigation_topic": "/test/navigation",
        "base_frame": "base_link",
    }
    path = folder / "rig.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


class Vehicle:
    """Publishes to the inputs of one node until it is stopped; drives a circle at constant speed."""

    def __init__(
        self,
        bench: Bench,
        node_name: str,
        cameras: Sequence[Camera],
        sim_time: bool = False,
        rate: float = 1.0,
        odometry_hz: float = 50.0,
        speed_mps: float = 10.0,
        yaw_rate_rps: float = 0.05,
        seed: int = 0,
        topics: dict[str, str] | None = None,
    ):
        self.cameras = {camera.name: camera for camera in cameras}
        self.sim_time = sim_time
        self.rate = rate
        self.odometry_hz = odometry_hz
        self.speed_mps = speed_mps
        self.yaw_rate_rps = yaw_rate_rps
        self.odometry_fault: Callable[[Odometry], Odometry | None] | None = None
        #: Added to every stamp and to /clock: a jump of the clock, or a recording that starts again.
        self.shift_ns = 0
        self._random = random.Random(seed)
        self._start_ns = 1_700_000_000_000_000_000 if sim_time else time.time_ns()
        self._start_s = time.monotonic()
        self._paused_s: float | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tie = itertools.count()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        node, name = bench.node, lambda topic: (topics or {}).get(topic, f"{node_name}/input/{topic}")
        self._publishers = {
            camera.name: node.create_publisher(camera.message_type, name(camera.topic), IMAGE_QOS) for camera in cameras
        }
        self._odometry = node.create_publisher(Odometry, name("odometry"), QoSProfile(depth=50))
        self._navigation = node.create_publisher(String, name("navigation"), QoSProfile(depth=5))
        self._clock = node.create_publisher(Clock, "/clock", qos_profile_sensor_data) if sim_time else None
        self._node = node
        self._thread = threading.Thread(target=self._run, name="vehicle", daemon=True)

    def __enter__(self) -> Vehicle:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to drive."""
        self._start_s = time.monotonic()
        for camera in self.cameras.values():
            self._at(camera.skew_s + 0.05, lambda camera=camera: self._expose(camera, 0))
        self._at(0.0, lambda: self._odometry_tick(0))
        if self._clock is not None:
            self._at(0.0, self._clock_tick)
        self._thread.start()

    def stop(self) -> None:
        """Stop driving and leave the topics; raises what went wrong in the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        for publisher in [*self._publishers.values(), self._odometry, self._navigation, self._clock]:
            if publisher is not None:
                self._node.destroy_publisher(publisher)
        if self._errors:
            raise self._errors[0]

    def now_ns(self) -> int:
        """The vehicle's clock, nanoseconds."""
        return self._stamp(self._elapsed_s())

    def jump(self, seconds: float) -> None:
        """Move the clock and all stamps by so much."""
        with self._lock:
            self.shift_ns += round(seconds * 1e9)

    def pause(self) -> None:
        """Stop everything, /clock with it, as a player does."""
        with self._lock:
            self._paused_s = time.monotonic()

    def resume(self) -> None:
        """Go on where ``pause`` stopped."""
        with self._lock:
            assert self._paused_s is not None
            self._start_s += time.monotonic() - self._paused_s
            self._paused_s = None

    def navigate(self, text: str) -> None:
        """Publish a navigation instruction."""
        self._navigation.publish(String(data=text))

    def publish_image(self, camera_name: str, message: ImageMessage) -> None:
        """Publish a message of the caller's own making beside the schedule."""
        self._publishers[camera_name].publish(message)

    def publish_odometry(self, message: Odometry) -> None:
        """Publish an odometry message of the caller's own making beside the schedule."""
        self._odometry.publish(message)

    def odometry_at(self, stamp_ns: int) -> Odometry:
        """True motion of the vehicle."""
        t = (stamp_ns - self._start_ns) / 1e9
        yaw, radius = self.yaw_rate_rps * t, self.speed_mps / self.yaw_rate_rps
        message = Odometry(child_frame_id="base_link")
        message.header.stamp, message.header.frame_id = to_time(stamp_ns), "odom"
        message.pose.pose.position.x = radius * math.sin(yaw)
        message.pose.pose.position.y = radius * (1 - math.cos(yaw))
        message.pose.pose.orientation.z = math.sin(yaw / 2)
        message.pose.pose.orientation.w = math.cos(yaw / 2)
        message.twist.twist.linear.x = self.speed_mps
        message.twist.twist.angular.z = self.yaw_rate_rps
        return message

    def _elapsed_s(self) -> float:
        now_s = time.monotonic() if self._paused_s is None else self._paused_s
        return (now_s - self._start_s) * self.rate

    def _stamp(self, elapsed_s: float) -> int:
        return self._start_ns + self.shift_ns + round(elapsed_s * 1e9)

    def _at(self, elapsed_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (elapsed_s, next(self._tie), action))

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                due_s = self._events[0][0]
                if self._paused_s is not None:
                    self._stop.wait(0.005)
                    continue
                wait_s = due_s / self.rate + self._start_s - time.monotonic()
                if wait_s > 0:
                    if self._stop.wait(wait_s):
                        return
                    continue
                _, _, action = heapq.heappop(self._events)
                with self._lock:
                    action()
        except BaseException as error:
            self._errors.append(error)

    def _clock_tick(self) -> None:
        self._publish_clock()
        self._at(self._elapsed_s() + CLOCK_PERIOD_S * self.rate, self._clock_tick)

    def _publish_clock(self) -> None:
        if self._clock is not None:
            self._clock.publish(Clock(clock=to_time(self._stamp(self._elapsed_s()))))

    def _odometry_tick(self, count: int) -> None:
        message: Odometry | None = self.odometry_at(self._stamp(count / self.odometry_hz))
        if self.odometry_fault is not None:
            message = self.odometry_fault(message)
        if message is not None:
            self._publish_clock()
            self._odometry.publish(message)
        self._at((count + 1) / self.odometry_hz, lambda: self._odometry_tick(count + 1))

    def _expose(self, camera: Camera, number: int) -> None:
        chance = self._random
        period_s = 1.0 / camera.rate_hz
        nominal_s = camera.skew_s + 0.05 + number * period_s
        exposed_s = nominal_s + chance.uniform(-camera.jitter_s, camera.jitter_s)
        arrival_s = nominal_s + camera.jitter_s + chance.uniform(0.0, camera.delay_s)
        if chance.random() < camera.reorder:
            arrival_s += 1.3 * period_s
        if chance.random() >= camera.loss:
            self._at(arrival_s, lambda: self._deliver(camera, number, self._stamp(exposed_s)))
        self._at(nominal_s + period_s, lambda: self._expose(camera, number + 1))

    def _deliver(self, camera: Camera, number: int, stamp_ns: int) -> None:
        message: ImageMessage | None = camera.message(number, stamp_ns)
        if camera.fault is not None:
            message = camera.fault(message, number)
        else:
            camera.delivered[stamp_ns] = Delivered(number, stamp_ns, time.monotonic())
        if message is not None:
            self._publish_clock()
            self._publishers[camera.name].publish(message)
