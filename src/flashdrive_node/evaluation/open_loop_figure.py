"""The picture of open-loop windows: errors and decisions by class."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

from flashdrive_node.evaluation.drive_figure import bars
from flashdrive_node.evaluation.open_loop_report import TEXTS, OpenLoopReport


def figure_png(report: OpenLoopReport) -> bytes:
    """ADE by decision for every policy, shares of right texts by decision, and what was stated instead."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    policies = list(report.rows)
    talks = [policy for policy in policies if any(row.text is not None for row in report.rows[policy])]
    figure = plt.figure(figsize=(15, 6 + 13 * len(talks)), layout="constrained")
    grid = figure.add_gridspec(1 + 2 * len(talks), 1, height_ratios=[6] + [4, 9] * len(talks))
    first = report.rows[policies[0]]
    scenes = len({row.index for row in first})
    figure.suptitle(
        f"Open loop: {len(first)} windows of {scenes} scenes, mean and 95 % interval over scenes", fontsize=13
    )
    tables = {policy: report.by_decision(policy) for policy in policies}
    labels = list(tables[policies[0]])
    names = [_title(label) for label in labels]
    axis = figure.add_subplot(grid[0])
    bars(axis, names, {policy: [tables[policy][label]["ade@6.4s"] for label in labels] for policy in policies})
    axis.set(title="ADE over 6.4 s by decision of the expert", ylabel="m")
    axis.legend(fontsize=9)
    for number, policy in enumerate(talks):
        axis = figure.add_subplot(grid[1 + 2 * number])
        shares = ("cause_right", "decision_right")
        bars(axis, names, {TEXTS[name]: [tables[policy][label][name] for label in labels] for name in shares}, 100)
        axis.set(title=f"{policy}: what the text says", ylabel="%")
        axis.legend(fontsize=9, loc="lower right")
        _confusion(figure.add_subplot(grid[2 + 2 * number]), report.confusion(policy), policy)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def _confusion(axis: Any, table: dict[str, dict[str, int]], policy: str) -> None:
    truths = list(table)
    stated = [*truths, *sorted({one for row in table.values() for one in row} - set(truths))]
    counts = np.array([[table[truth].get(one, 0) for one in stated] for truth in truths], float)
    shares = 100 * counts / counts.sum(axis=1, keepdims=True)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[row, column] > 60 else "black"
        share = f"{shares[row, column]:.0f}" if shares[row, column] >= 0.5 else "<1"
        axis.text(column, row, share, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(stated)), [_title(one) for one in stated], fontsize=8)
    axis.set_yticks(range(len(truths)), [_title(one).replace("\n", " ") for one in truths], fontsize=8)
    axis.set(title=f"{policy}: decision stated in place of each one, %", xlabel="stated", ylabel="the expert's")


def _title(label: str) -> str:
    return label.lower().replace("_", "\n")
