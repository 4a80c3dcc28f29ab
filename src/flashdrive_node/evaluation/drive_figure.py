"""The picture of closed-loop runs: scores by scenario, a bar per policy."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

from flashdrive_node.evaluation.drive_report import FIGURES, DriveReport
from flashdrive_node.evaluation.metrics import Estimate

_COLORS = ("#2b6fb3", "#e0a030", "#8a8a8a", "#4a9d5b")
#: Figures of the rows by scenario.
_ROWS = ("scene_score", "progress", "at_fault_collision", "off_road")
_FAULTS = ("at_fault_collision", "pedestrian", "off_road", "red_light", "stop_sign")
_GOOD = ("scene_score", "progress", "comfort")


def figure_png(report: DriveReport) -> bytes:
    """Means with their intervals over all scenes, and by scenario."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(15, 13), layout="constrained")
    grid = figure.add_gridspec(1 + len(_ROWS), 2, height_ratios=[1.2] + [1.0] * len(_ROWS))
    scenes = len(next(iter(report.rows.values())))
    figure.suptitle(
        f"Closed loop: {scenes} scenes of the {report.settings.split} split, {report.settings.seconds:g} s each, "
        "mean and 95 % interval over scenes",
        fontsize=13,
    )
    overall = {policy: report.overall(policy) for policy in report.rows}
    for column, (names, title) in enumerate(((_GOOD, "more is better"), (_FAULTS, "less is better"))):
        axis = figure.add_subplot(grid[0, column])
        series = {policy: [figures[name] for name in names] for policy, figures in overall.items()}
        bars(axis, [FIGURES[name] for name in names], series, 100)
        axis.set(title=f"all scenes: {title}", ylabel="%")
    axis.legend(fontsize=9)
    scenarios = {policy: report.by_scenario(policy) for policy in report.rows}
    for row, name in enumerate(_ROWS, start=1):
        axis = figure.add_subplot(grid[row, :])
        kinds = sorted({kind for figures in scenarios.values() for kind in figures})
        series = {policy: [figures[kind][name] for kind in kinds] for policy, figures in scenarios.items()}
        bars(axis, [kind.lower().replace("_", "\n") for kind in kinds], series, 100)
        axis.set(title=FIGURES[name], ylabel="%")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def bars(axis: Any, names: list[str], series: dict[str, list[Estimate]], scale: float = 1.0) -> None:
    """Groups of bars with their intervals: a group per name, a bar in it per series."""
    width = 0.8 / len(series)
    for number, (policy, values) in enumerate(series.items()):
        places = np.arange(len(names)) + (number - (len(series) - 1) / 2) * width
        means = np.array([scale * e.mean for e in values])
        spread = np.array([[scale * (e.mean - e.low), scale * (e.high - e.mean)] for e in values]).T
        axis.bar(places, means, width, color=_COLORS[number % len(_COLORS)], label=policy)
        axis.errorbar(places, means, yerr=spread.clip(min=0), fmt="none", ecolor="#444444", elinewidth=0.8)
    axis.set_xticks(np.arange(len(names)), names, fontsize=8)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
