"""Predictions and deliveries of known motion, for tests of what is made of them."""

from __future__ import annotations

import math

import numpy as np

from flashdrive_node.engine.protocol import CameraFrames, Observation, Prediction, TrajectorySample
from flashdrive_node.runtime.delivery import Delivery
from flashdrive_node.runtime.ego_history import EgoWindow

T0_NS = 1_700_000_000_250_000_000


def arc(speed: float, curvature: float, acceleration: float = 0.0, text: str = "Keep the lane.") -> TrajectorySample:
    """64 waypoints on a circle, from the vehicle on."""
    times = 0.1 * np.arange(1, 65)
    length = speed * times + acceleration * times**2 / 2
    yaw = curvature * length
    chord = length * np.sinc(yaw / 2 / math.pi)
    xyz = np.stack([chord * np.cos(yaw / 2), chord * np.sin(yaw / 2), np.zeros(64)], axis=1)
    return TrajectorySample(
        xyz=xyz.astype(np.float32),
        yaw=yaw.astype(np.float32),
        speed=(speed + acceleration * times).astype(np.float32),
        acceleration=np.full(64, acceleration, np.float32),
        curvature=np.full(64, curvature, np.float32),
        reasoning=text,
        reasoning_complete=True,
    )


def prediction(*samples: TrajectorySample, chosen: int = 0) -> Prediction:
    """A prediction of window 7."""
    return Prediction(7, T0_NS, samples, chosen, 8.0, {"encode": 1.5, "decode": 2.5}, {"accept_length": 3.0})


def delivery(result: Prediction, nav_text: str | None = "Turn left in 40m") -> Delivery:
    """A window of two cameras that the engine answered with ``result``."""
    stamps = tuple(T0_NS - k * 100_000_000 for k in (3, 2, 1, 0))
    images = tuple(np.zeros((2, 2, 3), np.uint8) for _ in stamps)
    cameras = (CameraFrames(0, stamps, images), CameraFrames(6, stamps, images))
    xyz, rot = np.zeros((16, 3), np.float32), np.tile(np.eye(3, dtype=np.float32), (16, 1, 1))
    ego = EgoWindow(
        t0_ns=T0_NS,
        xyz=xyz,
        rot=rot,
        position=np.array([100.0, -50.0, 2.0]),
        orientation_xyzw=np.array([0.0, 0.0, math.sin(0.4), math.cos(0.4)]),
        frame_id="odom",
        child_frame_id="base_link",
        speed_twist=8.0,
        speed_implied=8.0,
        extrapolated_s=0.0,
    )
    return Delivery(
        kind="result",
        window_id=result.window_id,
        t0_ns=T0_NS,
        prediction=result,
        observation=Observation(result.window_id, T0_NS, cameras, xyz, rot, nav_text),
        ego=ego,
        epoch=1,
        stamps_ns={"left": stamps, "tele": stamps},
        text="",
        received_ns=1_000_000_000,
        chosen_ns=1_002_000_000,
        submitted_ns=1_010_000_000,
        started_ns=1_011_000_000,
        finished_ns=1_050_000_000,
    )
