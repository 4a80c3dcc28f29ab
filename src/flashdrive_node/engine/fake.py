"""An engine without a model: drives on at constant speed and yaw rate, and fails on demand. For tests and demos."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition
from typing import Literal

import numpy as np

from flashdrive_node.engine.protocol import (
    EngineError,
    EngineInfo,
    Observation,
    Prediction,
    Progress,
    TrajectorySample,
)

#: Waypoints of a prediction and their spacing.
WAYPOINTS, WAYPOINT_DT_S = 64, 0.1
#: What a car can steer, 1/m.
MAX_CURVATURE = 0.2

#: slow: takes ``slow_latency_s``. raise: EngineError. hang: does not return until the fault changes or the engine is
#: closed. out_of_memory: MemoryError. nan: a NaN waypoint. short: the reasoning has no end. jump: starts 10 m ahead.
Fault = Literal["none", "slow", "raise", "hang", "out_of_memory", "nan", "short", "jump"]
FAULTS: tuple[Fault, ...] = ("none", "slow", "raise", "hang", "out_of_memory", "nan", "short", "jump")


@dataclass(frozen=True)
class FakeSettings:
    """How the fake engine behaves."""

    #: Time that a step takes.
    latency_s: float = 0.05
    #: Time that a step takes under the fault "slow".
    slow_latency_s: float = 0.5
    load_s: float = 0.0
    warm_up_s: float = 0.0
    samples: int = 1
    #: Called with every observation; its figures go into ``Prediction.metrics``. Also as "package.module:function".
    probe: Callable[[Observation], dict[str, float]] | str | None = None


class FakeEngine:
    """Engine protocol without networks. ``set_fault``, ``set_latency`` and ``release`` may be called by any thread."""

    def __init__(self, settings: FakeSettings | None = None):
        self.settings = settings = settings or FakeSettings()
        if settings.samples < 1:
            raise ValueError(f"samples must be at least 1, found {settings.samples}")
        self._probe = load_probe(settings.probe)
        self._latency_s = settings.latency_s
        self._fault: Fault = "none"
        self._changed = Condition()
        self._loaded = False
        self._released = False
        self._stream_windows = 0

    def set_fault(self, fault: Fault) -> None:
        """Switch a fault on ("none": off); a hanging step is released by any change."""
        if fault not in FAULTS:
            raise ValueError(f"fault must be one of {', '.join(FAULTS)}, found {fault!r}")
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    def set_latency(self, latency_s: float) -> None:
        """Time of the steps from now on."""
        self._latency_s = latency_s

    def release(self) -> None:
        """Let a hanging step go on, for a shutdown that must not wait for it."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def load(self, progress: Progress | None = None) -> EngineInfo:
        """Wait for the configured time, reporting progress."""
        _wait(self.settings.load_s, "loading", progress)
        self._loaded = True
        self._stream_windows = 0
        return EngineInfo(
            name="fake (constant speed and yaw rate, no model)",
            checkpoint="none",
            sha256="",
            device="cpu",
            precision="float32",
            history_poses=16,
            waypoints=WAYPOINTS,
            waypoint_dt_s=WAYPOINT_DT_S,
        )

    def warm_up(self, progress: Progress | None = None) -> None:
        """Wait for the configured time."""
        _wait(self.settings.warm_up_s, "warming up", progress)

    def step(self, observation: Observation) -> Prediction:
        """Constant speed and yaw rate, both measured from the ego history."""
        if not self._loaded:
            raise EngineError("step needs a loaded engine, load() was not called or close() was")
        start_ns = time.monotonic_ns()
        fault = self._fault
        if fault == "raise":
            raise EngineError("the fault 'raise' is switched on")
        if fault == "out_of_memory":
            raise MemoryError("the fault 'out_of_memory' is switched on")
        if fault == "hang":
            with self._changed:
                self._changed.wait_for(lambda: self._fault != "hang" or self._released)
        metrics = dict(self._probe(observation)) if self._probe else {}
        self._stream_windows += 1
        metrics["stream_windows"] = float(self._stream_windows)
        speed, yaw_rate = _motion(observation)
        text = (
            f"Window {observation.window_id}: keep {speed:.1f} m/s and {math.degrees(yaw_rate):.1f} deg/s "
            "(extrapolated from the ego history, no model)."
        )
        # Samples fan out in yaw rate around the first one, the same way in every window.
        count = self.settings.samples
        offsets = [0.0] + [0.02 * (-1) ** k * ((k + 1) // 2) for k in range(1, count)]
        samples = tuple(_sample(speed, yaw_rate + offset, text, fault) for offset in offsets)
        latency_s = self.settings.slow_latency_s if fault == "slow" else self._latency_s
        rest_s = latency_s - (time.monotonic_ns() - start_ns) / 1e9
        if rest_s > 0:
            time.sleep(rest_s)
        timings_ms = {"total": (time.monotonic_ns() - start_ns) / 1e6}
        return Prediction(observation.window_id, observation.t0_ns, samples, 0, speed, timings_ms, metrics)

    def reset(self, reason: str) -> None:
        """Count the windows of the stream (metric "stream_windows") from one again."""
        self._stream_windows = 0

    def close(self) -> None:
        """Forget that it was loaded."""
        self._loaded = False


def load_probe(
    probe: Callable[[Observation], dict[str, float]] | str | None,
) -> Callable[[Observation], dict[str, float]] | None:
    """The function itself, or the one that "package.module:function" names.

    Raises:
        ValueError: The text does not name an importable function.
    """
    if not isinstance(probe, str):
        return probe
    if not probe:
        return None
    module, _, name = probe.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"probe must be 'package.module:function', {probe!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"probe must name a function, {probe!r} is {type(function).__name__}")
    return function


def _motion(observation: Observation) -> tuple[float, float]:
    """Forward speed (m/s) and yaw rate (rad/s) over the last 0.1 s of the ego history."""
    xyz, rot = observation.ego_history_xyz, observation.ego_history_rot
    yaw_step = -math.atan2(float(rot[-2, 1, 0]), float(rot[-2, 0, 0]))
    # The chord of an arc is shorter than the arc: undo it, so that a circle is continued at its own speed.
    chord = math.hypot(float(xyz[-2, 0]), float(xyz[-2, 1]))
    arc = chord / np.sinc(yaw_step / 2 / math.pi)
    return math.copysign(arc, -float(xyz[-2, 0])) / WAYPOINT_DT_S, yaw_step / WAYPOINT_DT_S


def _sample(speed: float, yaw_rate: float, text: str, fault: Fault) -> TrajectorySample:
    # Slower than this the measured yaw rate is noise, and curvature = yaw rate / speed would explode.
    curvature = min(max(yaw_rate / speed, -MAX_CURVATURE), MAX_CURVATURE) if abs(speed) > 0.5 else 0.0
    yaw_rate = curvature * speed
    times = WAYPOINT_DT_S * np.arange(1, WAYPOINTS + 1)
    yaw = yaw_rate * times
    # Chord of the arc, at half the turned angle.
    chord = speed * times * np.sinc(yaw / 2 / math.pi)
    xyz = np.stack([chord * np.cos(yaw / 2), chord * np.sin(yaw / 2), np.zeros(WAYPOINTS)], axis=1).astype(np.float32)
    if fault == "nan":
        xyz[WAYPOINTS // 2] = np.nan
    elif fault == "jump":
        xyz[:, 0] += 10.0
    complete = fault != "short"
    return TrajectorySample(
        xyz=xyz,
        yaw=yaw.astype(np.float32),
        speed=np.full(WAYPOINTS, speed, np.float32),
        acceleration=np.zeros(WAYPOINTS, np.float32),
        curvature=np.full(WAYPOINTS, curvature, np.float32),
        reasoning=text if complete else text[: len(text) // 3],
        reasoning_complete=complete,
    )


def _wait(duration_s: float, text: str, progress: Progress | None) -> None:
    steps = 10 if duration_s > 0 else 1
    for k in range(steps):
        if progress is not None:
            progress(k / steps, text)
        time.sleep(duration_s / steps)
    if progress is not None:
        progress(1.0, text)
