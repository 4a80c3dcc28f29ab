"""The plots of an evaluation, as PNG."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

from flashdrive_node.evaluation.clip_scores import WorstWindow
from flashdrive_node.evaluation.evaluation_summary import Summary

_HORIZONS = ("1s", "3s", "5s", "6.4s")
_SERIES = {"ade": ("ADE", "#2b6fb3"), "min_ade": ("minADE", "#e0872b")}


def summary_png(summary: Summary) -> bytes:
    """Errors by horizon and by window index, latency by stage, accept lengths, labels, velocity over the flow."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(12, 12), layout="constrained")
    _by_horizon(axes[0][0], summary)
    _by_window(axes[0][1], summary)
    _latency(axes[1][0], summary)
    _accept_lengths(axes[1][1], summary)
    _labels(axes[2][0], summary)
    _velocity_change(axes[2][1], summary)
    return _png(figure)


def worst_png(worst: WorstWindow) -> bytes:
    """Bird's-eye view of planned and driven paths, ahead to the right."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 2.8), layout="constrained")
    for number, planned in enumerate(worst.planned):
        label = "planned" if not number else None
        axis.plot(*np.array([[0.0, 0.0], *planned]).T, color="#2b6fb3", linewidth=1.2, alpha=0.8, label=label)
    axis.plot(*np.array([[0.0, 0.0], *worst.driven]).T, color="#222222", linewidth=2.2, label="driven")
    axis.plot(0, 0, "o", color="#222222", markersize=5)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set(xlabel="ahead [m]", ylabel="left [m]")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _png(figure)


def _by_horizon(axis: Any, summary: Summary) -> None:
    at = np.arange(len(_HORIZONS))
    for offset, (name, (label, color)) in zip((-0.2, 0.2), _SERIES.items(), strict=True):
        found = [summary.errors[f"{name}@{h}"] for h in _HORIZONS]
        means = np.array([e.mean for e in found])
        reach = np.array([[e.mean - e.low for e in found], [e.high - e.mean for e in found]])
        bars = axis.bar(at + offset, means, 0.38, yerr=reach.clip(min=0), color=color, label=label, capsize=3)
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_xticks(at, [h.replace("s", " s") for h in _HORIZONS])
    axis.set(title="error up to a horizon, interval over clips", ylabel="[m]")
    axis.legend(fontsize=8)


def _by_window(axis: Any, summary: Summary) -> None:
    for name, (label, color) in _SERIES.items():
        curve = summary.by_window[f"{name}@6.4s"]
        at = [first for first, _ in curve]
        axis.plot(at, [e.mean for _, e in curve], "o-", color=color, label=label, markersize=3)
        axis.fill_between(at, [e.low for _, e in curve], [e.high for _, e in curve], color=color, alpha=0.2)
    axis.set(title="error by place of the window in its clip (drift)", xlabel="first window of ten", ylabel="[m]")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _latency(axis: Any, summary: Summary) -> None:
    stages = list(summary.latency_ms)
    rows = np.arange(len(stages))
    for offset, name, color in ((-0.2, "p50", "#2b6fb3"), (0.2, "p99", "#9cc3e6")):
        values = [getattr(summary.latency_ms[stage], name) for stage in stages]
        bars = axis.barh(rows + offset, values, 0.38, color=color, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axis.set_yticks(rows, stages)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(title="latency by stage", xlabel="[ms]")
    axis.legend(fontsize=8)


def _accept_lengths(axis: Any, summary: Summary) -> None:
    axis.set(title="tokens gained per pass of the model", xlabel="mean over a window", ylabel="windows")
    if not summary.accept_lengths:
        _nothing(axis, "no drafter: one token per pass")
        return
    lengths = [float(length) for length in summary.accept_lengths]
    axis.bar(lengths, list(summary.accept_lengths.values()), 0.42, color="#4a9d5b")
    mean = summary.metrics["accept_length"]
    axis.axvline(mean, color="#222222", linewidth=1, label=f"mean {mean:.2f}")
    axis.legend(fontsize=8)


def _velocity_change(axis: Any, summary: Summary) -> None:
    """Median and middle 80 % of the windows."""
    axis.set(title="change of the velocity from step to step of the flow", xlabel="flow time", ylabel="[%]")
    if not summary.velocity_change:
        _nothing(axis, "not looked at in these results")
        return
    low, median, high = 100 * np.array(summary.velocity_change).T
    times = np.arange(1, len(median) + 1) / (len(median) + 1)
    axis.fill_between(times, low, high, color="#8a4f9e", alpha=0.2, linewidth=0)
    axis.plot(times, median, "o-", color="#8a4f9e", markersize=4)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _nothing(axis: Any, why: str) -> None:
    axis.text(0.5, 0.5, why, ha="center", va="center", transform=axis.transAxes)


def _labels(axis: Any, summary: Summary) -> None:
    labels = list(summary.labels)
    axis.set(title="texts that state the driver's label", xlim=(0, 1))
    if not labels:
        _nothing(axis, "no labels in this source")
        return
    rows = np.arange(len(labels))
    bars = axis.barh(rows, [summary.labels[label][0] for label in labels], color="#4a9d5b")
    axis.bar_label(bars, [f"{summary.labels[label][1]} texts" for label in labels], fontsize=7, padding=2)
    axis.set_yticks(rows, [label.lower().replace("_", " ") for label in labels], fontsize=7)
    axis.invert_yaxis()


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()
