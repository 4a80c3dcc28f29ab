"""A pipeline fed with cameras and odometry on a timeline of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import cv2
import numpy as np

from flashdrive_node.engine.fake import FakeEngine, FakeSettings
from flashdrive_node.runtime.delivery import Delivery
from flashdrive_node.runtime.observation import OdometrySample, RawImage
from flashdrive_node.runtime.pipeline import Pipeline, PipelineSettings
from flashdrive_node.runtime.rig import CameraSpec, Rig

START_NS = 1_700_000_000_000_000_000

CAMERAS = {0: "cross_left", 1: "front_wide", 2: "cross_right", 6: "front_tele"}
#: The simulated vehicle drives a circle.
SPEED, YAW_RATE = 8.0, 0.2


def jpeg(camera_index: int, number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A small picture whose content depends on camera and number."""
    width, height = size
    picture = np.full((height, width, 3), 40 * camera_index, np.uint8)
    cv2.putText(picture, str(number), (2, height - 8), cv2.FONT_HERSHEY_PLAIN, 1.0, (255, 255, 255))
    return bytes(cv2.imencode(".jpg", picture)[1])


class Drive:
    """Feeds a pipeline with cameras and odometry on a timeline of its own, and collects what comes out."""

    def __init__(self, settings: PipelineSettings | None = None, rate_hz: int = 10, engine: FakeEngine | None = None):
        specs = tuple(CameraSpec(name, index, f"/{name}", "compressed", rate_hz) for index, name in CAMERAS.items())
        self.period_ns = 10**9 // rate_hz
        self.engine = engine or FakeEngine(FakeSettings(latency_s=0.0))
        self.deliveries: list[Delivery] = []
        self.pipeline = Pipeline(
            Rig("test", specs, "/odometry", None), lambda: self.engine, self.deliveries.append, settings
        )
        self.pipeline.start()
        self.wait(lambda: self.pipeline.worker.ready)
        self.pipeline.set_active(True)
        self.tick = 0
        self.offset_ns = 0
        self.make_image: Callable[[int, int], bytes | None] = jpeg
        self.odometry: Callable[[OdometrySample], OdometrySample | None] = lambda sample: sample

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, self.pipeline.status()
            time.sleep(0.002)

    def stamp_ns(self) -> int:
        return START_NS + self.offset_ns + self.tick * self.period_ns

    def run(self, ticks: int, settle: bool = True) -> None:
        """Advance by camera periods: five odometry samples, then one image per camera."""
        for _ in range(ticks):
            for k in range(-4, 1):
                sample = self.odometry(odometry_at(self.stamp_ns() + k * self.period_ns // 5))
                if sample is not None:
                    self.pipeline.on_odometry(sample)
            for index in CAMERAS:
                data = self.make_image(index, self.tick)
                if data is not None:
                    image = RawImage(self.stamp_ns(), time.monotonic_ns(), "jpeg", 0, 0, 0, False, data)
                    self.pipeline.on_image(index, image, self.stamp_ns())
            self.tick += 1
            if settle:
                self.settle()

    def settle(self) -> None:
        pipeline = self.pipeline
        self.wait(lambda: pipeline.worker.status().state != "busy" and not pipeline._claims and not pipeline._decoding)

    def results(self) -> list[Delivery]:
        return [delivery for delivery in self.deliveries if delivery.kind == "result"]

    def assert_accounts(self) -> None:
        for camera in self.pipeline.status().cameras:
            account = camera.account
            assert account.received == account.used + account.held + sum(account.dropped.values()), camera


def odometry_at(stamp_ns: int) -> OdometrySample:
    angle = YAW_RATE * (stamp_ns - START_NS) / 1e9
    radius = SPEED / YAW_RATE
    return OdometrySample(
        stamp_ns,
        "odom",
        "base_link",
        (radius * math.sin(angle), radius * (1 - math.cos(angle)), 0.0),
        (0.0, 0.0, math.sin(angle / 2), math.cos(angle / 2)),
        (SPEED, 0.0, 0.0),
        (0.0, 0.0, YAW_RATE),
    )
