"""What came of a replay: windows, drops, latencies, ages, resets and faults, read from the recorded outputs.

Everything here is computed from two bags, the one that was played and the one that the recorder wrote; nothing needs
ROS, and a report can be made again at any time.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.evaluation.bag_truth import read_truth
from flashdrive_node.evaluation.metrics import Percentiles
from flashdrive_node.evaluation.truth import ReasoningScore, score_reasoning
from flashdrive_node.runtime.bag import DIAGNOSTICS, messages, open_bag
from flashdrive_node.runtime.rig import Rig

#: What the stand-in means for a reader of the report.
FAKE_ENGINE = (
    "The engine of this run is the stand-in without a model: it continues the measured speed and yaw rate of the ego "
    "history and looks at no image. Everything around it is the real thing."
)
#: Ends of a window that are no result.
_NOT_COMPUTED = ("superseded", "discarded", "failed", "closed")
#: States of the inference in which a window reached the engine.
_ANSWERED = ("running", "withheld", "engine error", "hanging")
_LEVELS = ("OK", "WARN", "ERROR", "STALE")


@dataclass(frozen=True)
class StatusChange:
    """One change in what the node said about a part of itself."""

    time_s: float
    part: str
    level: str
    text: str


@dataclass
class ReplayReport:
    """The summary of one replay."""

    bag: str
    outputs: str
    rig: str
    engine: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    played: dict[str, Any] = field(default_factory=dict)
    published: int = 0
    #: Values of the last diagnostics by part of the node, as the node names them.
    counters: dict[str, dict[str, str]] = field(default_factory=dict)
    #: Windows that were computed and not published, windows without a result, resets: by cause.
    withheld: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    resets: dict[str, int] = field(default_factory=dict)
    #: Frames by camera: received, used, and dropped by cause.
    frames: dict[str, dict[str, int]] = field(default_factory=dict)
    #: Milliseconds by stage.
    latency_ms: dict[str, Percentiles] = field(default_factory=dict)
    #: Publication time minus t0 on the bag's clock, milliseconds.
    age_ms: Percentiles | None = None
    #: Mean distance in metres between the published trajectory and where the vehicle then was, by horizon.
    distance_to_driven_m: dict[str, float] = field(default_factory=dict)
    #: Mean over all points up to a horizon of that distance (ADE), over the windows whose future was recorded so far.
    ade_m: dict[str, float] = field(default_factory=dict)
    #: How the texts compare with the truth, where the recording knows it.
    reasoning: ReasoningScore | None = None
    changes: list[StatusChange] = field(default_factory=list)
    problem: str = ""

    @property
    def faults(self) -> list[StatusChange]:
        """Changes to ERROR."""
        return [change for change in self.changes if change.level == "ERROR"]

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Outputs:
    """What the recorder wrote, parsed."""

    #: Records in order of publication.
    records: list[dict[str, Any]]
    #: Time in nanoseconds, part of the node, level, text, values.
    statuses: list[tuple[int, str, int, str, dict[str, str]]]


@dataclass(frozen=True)
class DrivenPath:
    """Where the vehicle was, from the odometry of the played bag."""

    stamps_ns: NDArray[np.int64]
    #: x, y, unwrapped yaw in the odometry frame: float64 [N, 3].
    poses: NDArray[np.float64]

    def at(self, times_ns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Poses [K, 3] at times within the recording; NaN outside of it."""
        base = self.stamps_ns[0]
        x, known = (times_ns - base).astype(np.float64), (self.stamps_ns - base).astype(np.float64)
        columns = [np.interp(x, known, self.poses[:, i], left=np.nan, right=np.nan) for i in range(3)]
        return np.stack(columns, axis=1)

    def future(self, t0_ns: int, points: int = 64, dt_s: float = 0.1) -> NDArray[np.float64]:
        """Positions [points, 2] after t0 in the vehicle frame at t0, metres; NaN beyond the recording."""
        times = t0_ns + (np.arange(points + 1) * dt_s * 1e9).astype(np.int64)
        poses = self.at(times)
        turn = np.exp(-1j * poses[0, 2])
        moved = ((poses[:, 0] - poses[0, 0]) + 1j * (poses[:, 1] - poses[0, 1])) * turn
        return np.stack([moved.real, moved.imag], axis=1)[1:]

    def errors_m(self, record: dict[str, Any]) -> NDArray[np.float64]:
        """Distance of every point of a published path from where the vehicle then was; NaN beyond the recording."""
        planned = np.array(record["trajectory"]["xyz_m"])[:, :2]
        return np.linalg.norm(planned - self.future(record["t0_ns"], len(planned)), axis=1)

    def mean_error_m(self, record: dict[str, Any]) -> float | None:
        """Mean of `errors_m` over the whole path; None where the recording ends before the path does."""
        error = float(self.errors_m(record).mean())
        return None if np.isnan(error) else error


def read_outputs(path: Path) -> Outputs:
    """Records and diagnostics of a recorded output bag.

    Raises:
        BagError: The bag cannot be read.
    """
    records: list[dict[str, Any]] = []
    statuses: list[tuple[int, str, int, str, dict[str, str]]] = []
    with open_bag(path) as reader:
        wanted = [c for c in reader.connections if c.topic.endswith("/output/record") or c.topic == "/diagnostics"]
        for connection, stamp, raw in messages(reader, wanted):
            message: Any = reader.deserialize(raw, connection.msgtype)
            if connection.msgtype != DIAGNOSTICS:
                records.append(json.loads(message.data))
                continue
            said_ns = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
            for status in message.status:
                part = status.name.split(":", 1)[-1].strip()
                level = status.level[0] if isinstance(status.level, bytes) else int(status.level)
                values = {item.key: item.value for item in status.values}
                statuses.append((said_ns or stamp, part, level, status.message, values))
    return Outputs(records, statuses)


def read_driven_path(bag: Path, rig: Rig) -> DrivenPath:
    """Odometry poses of a bag.

    Raises:
        BagError: The bag cannot be read.
    """
    stamps, poses = [], []
    with open_bag(bag) as reader:
        wanted = [c for c in reader.connections if c.topic == rig.odometry_topic]
        for connection, _, raw in messages(reader, wanted):
            message: Any = reader.deserialize(raw, connection.msgtype)
            p, q = message.pose.pose.position, message.pose.pose.orientation
            stamps.append(message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec)
            yaw = np.arctan2(2 * (q.w * q.z + q.x * q.y), 1 - 2 * (q.y * q.y + q.z * q.z))
            poses.append((p.x, p.y, yaw))
    order = np.argsort(np.array(stamps), kind="stable")
    table = np.array(poses, np.float64).reshape(-1, 3)[order]
    table[:, 2] = np.unwrap(table[:, 2])
    return DrivenPath(np.array(stamps, np.int64)[order], table)


def make_report(
    bag: Path,
    outputs: Path | None,
    rig: Rig,
    played: dict[str, Any],
    problem: str = "",
    notes: Sequence[str] = (),
) -> ReplayReport:
    """Summarise a replay.

    Args:
        bag: The bag that was played.
        outputs: The bag that the recorder wrote; None where it has nothing.
        rig: The rig that was played.
        played: What the player says about what it played.
        problem: Why the run ended early.
        notes: What a reader must know about the run.

    Raises:
        BagError: A bag cannot be read.
    """
    report = ReplayReport(str(bag), str(outputs or ""), rig.name, conditions=_conditions(), played=played)
    report.problem, report.notes = problem, list(notes)
    if outputs is None:
        return report
    data, driven = read_outputs(outputs), read_driven_path(bag, rig)
    report.published = len(data.records)
    if data.records:
        report.engine = data.records[-1].get("engine") or {}
        ages = [(r["published_ns"] - r["t0_ns"]) / 1e6 for r in data.records]
        report.age_ms = Percentiles.of(ages)
        stages = {stage for record in data.records for stage in record["timings_ms"]}
        for stage in sorted(stages):
            report.latency_ms[stage] = Percentiles.of(
                [r["timings_ms"][stage] for r in data.records if stage in r["timings_ms"]]
            )
        errors = np.array([driven.errors_m(record) for record in data.records])
        report.distance_to_driven_m = _at_horizons(errors)
        report.ade_m = _at_horizons(np.cumsum(errors, axis=1) / np.arange(1, errors.shape[1] + 1))
        truth = read_truth(bag)
        report.reasoning = score_reasoning(data.records, truth) if truth is not None else None
    if str(report.engine.get("name", "")).startswith("fake"):
        report.notes.append(FAKE_ENGINE)
    _read_statuses(report, data, int(driven.stamps_ns[0]))
    return report


def _at_horizons(table: NDArray[np.float64]) -> dict[str, float]:
    """Means over windows [N, points] at some horizons, without windows that have none there."""
    found = {}
    for horizon_s in (1.0, 3.0, 6.4):
        column = table[:, round(horizon_s * 10) - 1]
        if not np.isnan(column).all():
            found[f"{horizon_s:g} s"] = round(float(np.nanmean(column)), 3)
    return found


def _read_statuses(report: ReplayReport, data: Outputs, start_ns: int) -> None:
    end_s = report.played.get("start_offset_s", 0.0) + report.played.get("played_s", 0.0)
    # Until the first window is answered, missing inputs are no fault, and the end of the recording is none either.
    answered = (i for i, (_, part, _, _, values) in enumerate(data.statuses) if values.get("state") in _ANSWERED)
    first = next(answered, 0)
    last: dict[str, tuple[int, str]] = {}
    for number, (stamp, part, level, text, values) in enumerate(data.statuses):
        report.counters[part] = values
        time_s = (stamp - start_ns) / 1e9
        # The inference has several kinds of ERROR; every other part is told apart by its level alone.
        now = (level, values.get("state", "") if part == "inference" and level else "")
        if number >= first and time_s <= end_s and last.get(part, (0, "")) != now:
            name = _LEVELS[level] if level < len(_LEVELS) else str(level)
            report.changes.append(StatusChange(round(time_s, 3), part, name, text))
            last[part] = now
    for part, values in report.counters.items():
        if part.startswith("camera "):
            frames = {key: int(values[key]) for key in ("received", "used", "held") if key in values}
            report.frames[part.removeprefix("camera ")] = frames | _counts(values, "dropped_")
    inference = report.counters.get("inference", {})
    report.withheld = _counts(inference, "withheld_")
    report.resets = _counts(inference, "reset_")
    windows = _counts(inference, "windows_")
    report.dropped = {kind: windows[kind] for kind in _NOT_COMPUTED if windows.get(kind)}


def _counts(values: dict[str, str], prefix: str) -> dict[str, int]:
    """The counters of one group, by what stands after the prefix."""
    return {
        key.removeprefix(prefix): int(value)
        for key, value in values.items()
        if key.startswith(prefix) and value.isdigit()
    }


def _conditions() -> dict[str, Any]:
    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(errors="replace").splitlines() if file.exists() else []
