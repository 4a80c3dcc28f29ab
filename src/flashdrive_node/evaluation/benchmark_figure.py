"""The picture of a benchmark: one stacked bar per configuration, and the device's floor as a mark."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

from flashdrive_node.evaluation.benchmark import Measurement
from flashdrive_node.evaluation.benchmark_report import STAGES, Report
from flashdrive_node.evaluation.configurations import CONFIGURATIONS

#: Apart in lightness as well as in hue, so that they stay apart in grey and for colour-blind readers.
_COLORS = {
    "images": "#9aa5b1",
    "encode": "#1f5a92",
    "prefill": "#5ba3d9",
    "decode": "#e08a2e",
    "action": "#2f8f5b",
    "other": "#d8d8d8",
}


def figure_png(report: Report) -> bytes:
    """Stacked bars of the stages' medians, a panel per number of samples, as a PNG 1400 pixels wide."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = sorted({m.samples for m in report.measurements})
    bars = max(len([m for m in report.measurements if m.samples == n]) for n in panels)
    height = len(panels) * (0.55 * bars + 1.0) + 1.1
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, height), squeeze=False, sharex=True, layout="constrained")
    for axis, samples in zip(axes[:, 0], panels, strict=True):
        _panel(axis, [m for m in report.measurements if m.samples == samples], samples)
    axes[-1, 0].set_xlim(0, 1.2 * max(m.stages["total"].p50_ms for m in report.measurements))  # room for the numbers
    axes[-1, 0].set_xlabel("milliseconds per window, median", fontsize=13)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=12, frameon=False)
    device, precision = report.conditions["device"], report.conditions["precision"]
    weights = report.conditions["weights"].partition(":")[0]
    figure.suptitle(f"{device}, {precision}, weights {weights}", fontsize=13, x=0.99, y=-0.01, ha="right", va="top")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)
    return buffer.getvalue()


def _panel(axis: Any, measurements: list[Measurement], samples: int) -> None:
    rows = range(len(measurements))
    left = [0.0] * len(measurements)
    for stage in STAGES:
        widths = [_share(m, stage) for m in measurements]
        axis.barh(rows, widths, 0.66, left=left, color=_COLORS[stage], label=stage, edgecolor="white", linewidth=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, m in enumerate(measurements):
        label = "floor of this device" if row == 0 else None
        floor = m.floors["total"].ms
        axis.plot([floor, floor], [row - 0.4, row + 0.4], color="black", linewidth=2.2, label=label)
        total = m.stages["total"]
        axis.annotate(
            f"{total.p50_ms:.0f}  (p99 {total.p99_ms:.0f})",
            (left[row], row),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
        )
    axis.set_yticks(rows, [CONFIGURATIONS[m.configuration].title for m in measurements], fontsize=13)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=12)
    axis.set_title(f"{samples} sample" + ("s" if samples > 1 else ""), fontsize=13, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _share(measurement: Measurement, stage: str) -> float:
    """Length of a stage. The bar is as long as the median of the total; medians do not add up by themselves."""
    stages = measurement.stages
    known = {name: stages[name].p50_ms for name in STAGES if name in stages and name != "other"}
    if stage == "other":
        return max(0.0, stages["total"].p50_ms - sum(known.values()))
    return known.get(stage, 0.0)
