"""The pictures of a replay report: one PNG with four plots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from flashdrive_node.evaluation.replay_report import DrivenPath, Outputs, ReplayReport
from flashdrive_node.evaluation.strips import reasoning_strips, strip_colors
from flashdrive_node.evaluation.truth import Truth

_LEVEL_COLORS = {0: "#4a9d5b", 1: "#e0a030", 2: "#c63a3a", 3: "#8a8a8a"}
_LEVEL_NAMES = {0: "OK", 1: "WARN", 2: "ERROR", 3: "STALE"}
#: Stages that add up to the whole way, in order.
_STAGES = ("gather", "decode", "queue", "engine", "publish")


def summary_png(report: ReplayReport, outputs: Outputs, path: DrivenPath, truth: Truth | None = None) -> bytes:
    """Plan view, latency over time, latency by stage and the node's states, as one PNG.

    Where the recording knows the truth, errors of the paths and stated beside true decisions stand below.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = 2 if truth is None else 3
    figure, axes = plt.subplots(rows, 2, figsize=(13, 4.5 * rows), layout="constrained")
    engine = str(report.engine.get("name", "no engine"))
    figure.suptitle(f"flashdrive_node replay: {report.published} windows published, engine {engine}", fontsize=13)
    _plan_view(axes[0][0], outputs.records, path)
    _over_time(axes[0][1], outputs.records)
    _by_stage(axes[1][0], report)
    _states(axes[1][1], outputs)
    if truth is not None:
        _errors(axes[2][0], outputs.records, path)
        _decisions(axes[2][1], outputs.records, truth, path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def _plan_view(axis: Any, records: Sequence[dict[str, Any]], path: DrivenPath) -> None:
    axis.plot(path.poses[:, 0], path.poses[:, 1], color="#222222", linewidth=2.5, label="driven (odometry)")
    step = max(1, len(records) // 12)
    for number, record in enumerate(records[::step]):
        pose = path.at(np.array([record["t0_ns"]]))[0]
        c, s = np.cos(pose[2]), np.sin(pose[2])
        planned = np.array(record["trajectory"]["xyz_m"])[:, :2] @ np.array([[c, s], [-s, c]]) + pose[:2]
        axis.plot(
            *planned.T, color="#2b6fb3", alpha=0.65, linewidth=1.2, label="published trajectory" if not number else None
        )
        axis.plot(*pose[:2], "o", color="#2b6fb3", markersize=4)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set(title="plan view, odometry frame", xlabel="x [m]", ylabel="y [m]")
    axis.legend(loc="best", fontsize=8)
    axis.grid(alpha=0.3)


def _over_time(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    axis.set(title="per window", xlabel="time of t0 [s]", ylabel="[ms]")
    axis.grid(alpha=0.3)
    if not records:
        return
    start = records[0]["t0_ns"]
    time_s = [(r["t0_ns"] - start) / 1e9 for r in records]
    axis.plot(time_s, [(r["published_ns"] - r["t0_ns"]) / 1e6 for r in records], ".-", label="age when published")
    axis.plot(time_s, [r["timings_ms"].get("total", np.nan) for r in records], ".-", label="last image to published")
    axis.plot(time_s, [r["timings_ms"].get("engine", np.nan) for r in records], ".-", label="engine")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def _by_stage(axis: Any, report: ReplayReport) -> None:
    stages = [stage for stage in _STAGES if stage in report.latency_ms]
    rows = np.arange(len(stages))
    for offset, name, color in ((-0.2, "p50", "#2b6fb3"), (0.2, "p95", "#9cc3e6")):
        values = [getattr(report.latency_ms[stage], name) for stage in stages]
        bars = axis.barh(rows + offset, values, 0.38, color=color, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axis.set_yticks(rows, stages)
    axis.invert_yaxis()
    axis.set(title="time by stage", xlabel="[ms]")
    axis.margins(x=0.12)
    axis.legend(fontsize=8)


def _states(axis: Any, outputs: Outputs) -> None:
    axis.set(title="what the node said about itself", xlabel="time of the recording [s]")
    if not outputs.statuses:
        return
    start = min(stamp for stamp, *_ in outputs.statuses)
    parts = sorted({part for _, part, *_ in outputs.statuses})
    seen: set[int] = set()
    for row, part in enumerate(parts):
        series = [(stamp, level) for stamp, name, level, *_ in outputs.statuses if name == part]
        ends = [stamp for stamp, _ in series[1:]] + [series[-1][0]]
        for (stamp, level), end in zip(series, ends, strict=True):
            left, width = (stamp - start) / 1e9, max((end - stamp) / 1e9, 0.02)
            label = _LEVEL_NAMES.get(level) if level not in seen else None
            axis.barh(row, width, 0.7, left=left, color=_LEVEL_COLORS.get(level, "#000000"), label=label)
            seen.add(level)
    axis.set_yticks(range(len(parts)), parts, fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8, loc="lower right")


def _errors(axis: Any, records: Sequence[dict[str, Any]], path: DrivenPath) -> None:
    axis.set(title="distance to the driven path", xlabel="time of t0 [s]", ylabel="mean up to the horizon [m]")
    start = path.stamps_ns[0]
    time_s = [(r["t0_ns"] - start) / 1e9 for r in records]
    errors = [path.errors_m(record) for record in records]
    for horizon_s in (1.0, 3.0, 6.4):
        axis.plot(time_s, [e[: round(horizon_s * 10)].mean() for e in errors], ".-", label=f"over {horizon_s:g} s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _decisions(axis: Any, records: Sequence[dict[str, Any]], truth: Truth, path: DrivenPath) -> None:
    start, end = int(path.stamps_ns[0]), int(path.stamps_ns[-1])
    strips = reasoning_strips(sorted(records, key=lambda r: r["published_ns"]), truth, start, end)
    colors = strip_colors(strips)
    named: set[str] = set()
    for row, strip in enumerate(strips):
        for begin, stop, label in strip.spans:
            color = tuple(value / 255 for value in colors[label])
            axis.barh(row, stop - begin, 0.7, left=begin, color=color, label=label if label not in named else None)
            named.add(label)
    axis.set_yticks(range(len(strips)), [strip.name for strip in strips])
    axis.invert_yaxis()
    axis.set(title="decision: true, and stated by the newest text", xlabel="time [s]", xlim=(0, (end - start) / 1e9))
    axis.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))
