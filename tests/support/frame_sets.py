"""Judges the windows of a node by what its cameras really delivered, without any code of the node."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from support.vehicle import Camera, Delivered

FRAMES = 4
INTERVAL_NS = 100_000_000
TOLERANCE_NS = 50_000_000
#: Time that a published frame may take until the node has it.
TRANSPORT_S = 0.06
#: A set that is complete less than this before the last frame of the window that was answered: both came in one burst
#: behind a pause of the machine, and the newest is what counts.
ROOM_S = 0.05


@dataclass(frozen=True)
class Window:
    """One result of the node: its t0, and per camera name the stamps used and the numbers that the engine saw."""

    t0_ns: int
    stamps_ns: Mapping[str, tuple[int, ...]]
    seen: Mapping[str, tuple[int, ...]]


def nominal_ns(t0_ns: int) -> list[int]:
    """The times that the frames of a window stand for, oldest first."""
    return [t0_ns - (FRAMES - 1 - i) * INTERVAL_NS for i in range(FRAMES)]


def wrong_frames(window: Window, cameras: Mapping[str, Camera], reference: str) -> list[str]:
    """Everything that is wrong with the frames of one window; empty where nothing is."""
    problems = []
    if window.t0_ns != window.stamps_ns[reference][-1]:
        problems.append(f"t0 is not the newest stamp of {reference}")
    available_s = _available_s(window, cameras)
    for name, camera in cameras.items():
        stamps = window.stamps_ns[name]
        if len(stamps) != FRAMES or any(a >= b for a, b in itertools.pairwise(stamps)):
            problems.append(f"{name}: stamps {stamps} are not {FRAMES} increasing ones")
            continue
        for i, (stamp, wanted) in enumerate(zip(stamps, nominal_ns(window.t0_ns), strict=True)):
            frame = camera.delivered.get(stamp)
            if frame is None:
                problems.append(f"{name}[{i}]: stamp {stamp} was never published")
                continue
            if frame.number != window.seen[name][i]:
                problems.append(f"{name}[{i}]: stamp of frame {frame.number}, picture of frame {window.seen[name][i]}")
            if abs(stamp - wanted) > TOLERANCE_NS:
                problems.append(f"{name}[{i}]: {(stamp - wanted) / 1e6:+.1f} ms off")
            nearer = [
                other.number
                for other in camera.delivered.values()
                if other.published_s < available_s - TRANSPORT_S
                and abs(other.stamp_ns - wanted) < abs(stamp - wanted)
                and other.stamp_ns not in stamps
            ]
            if nearer:
                problems.append(f"{name}[{i}]: frame {frame.number} was taken, {nearer} were nearer")
    return problems


def missed_windows(windows: list[Window], cameras: Mapping[str, Camera], reference: str) -> list[int]:
    """Stamps of the reference camera that had a complete set in time, and for which there was room between results.

    A stamp counts where every camera delivered, in order, a frame within the tolerance of each nominal time. Cameras
    faster than the windows give the node two further frames of patience: it may wait for a nearer one. Not judged are
    stamps whose frames were published in one burst with the next window's.
    """
    period_ns = 1e9 / cameras[reference].rate_hz
    patience_ns = 2.5 * period_ns if period_ns < 0.9 * INTERVAL_NS else 0.5 * period_ns
    return [
        stamp
        for before, after in itertools.pairwise(windows)
        for stamp in sorted(cameras[reference].delivered)
        if before.t0_ns + 0.9 * INTERVAL_NS <= stamp <= after.t0_ns - patience_ns
        and _available_s(after, cameras) - _complete_s(stamp, cameras) >= ROOM_S
    ]


def _available_s(window: Window, cameras: Mapping[str, Camera]) -> float:
    """When the last frame of a window was published."""
    return max(
        cameras[name].delivered[stamp].published_s
        for name, stamps in window.stamps_ns.items()
        for stamp in stamps
        if stamp in cameras[name].delivered
    )


def _complete_s(t0_ns: int, cameras: Mapping[str, Camera]) -> float:
    """When the last frame of the set for a stamp was published; infinite where a frame is missing or out of order."""
    complete_s = 0.0
    for camera in cameras.values():
        used: set[int] = set()
        for wanted in nominal_ns(t0_ns):
            near = [f for f in camera.delivered.values() if abs(f.stamp_ns - wanted) <= TOLERANCE_NS]
            frame = min(near, key=lambda f: abs(f.stamp_ns - wanted), default=None)
            if frame is None or frame.stamp_ns in used or _late(frame, camera):
                return math.inf
            used.add(frame.stamp_ns)
            complete_s = max(complete_s, frame.published_s)
    return complete_s


def _late(frame: Delivered, camera: Camera) -> bool:
    """Whether the frame was handed over after its successor."""
    return any(o.stamp_ns > frame.stamp_ns and o.published_s < frame.published_s for o in camera.delivered.values())


def window_of(record: Mapping[str, Any], cameras: Mapping[str, Camera]) -> Window:
    """Read a record of ``~/output/record`` with the metrics of ``support.painted_probe``."""
    metrics = record["metrics"]
    seen = {
        name: tuple(int(metrics[f"camera_{camera.index}_frame_{i}"]) for i in range(FRAMES))
        for name, camera in cameras.items()
    }
    stamps = {name: tuple(int(s) for s in record["frame_stamps_ns"][name]) for name in cameras}
    return Window(int(record["t0_ns"]), stamps, seen)
