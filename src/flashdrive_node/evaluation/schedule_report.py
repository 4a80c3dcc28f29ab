"""What a search for a flow schedule found, as a table and as a picture."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np

from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.evaluation.schedule_search import SearchResult

_COLORS = ("#1f5a92", "#e08a2e", "#2f8f5b", "#8a4f9e", "#7a7a7a")


def markdown(result: SearchResult) -> str:
    """The candidates, least deviation first, and the one to take."""
    head = ["schedule", "evaluations", "`flow_schedule`", "from the full path", "at its end", "ADE", "ADE - full ADE"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for score in sorted(result.scores, key=lambda s: s.deviation_m.mean):
        cells = [score.name, str(score.evaluations), f"`{score.schedule}`"]
        cells += [str(score.deviation_m), str(score.end_deviation_m)]
        cells += ["unknown" if e is None else str(e) for e in (score.ade_m, score.ade_difference_m)]
        lines.append("| " + " | ".join(cells) + " |")
    k, best = result.settings.evaluations, result.best
    clips = best.deviation_m.clips
    lines += [
        "",
        f"Metres, means over {result.scored} windows of {clips} clip(s) of {result.source} with 95 % intervals over "
        f"clips; searched on {result.searched} other windows. The full path is that of schedule `{result.reference}` "
        "from the same noise and text. Of searched schedules the first guesses (search) and the one of the least bound "
        "on its error are compared.",
        "",
        f'Best of {k} evaluation(s): `flow_schedule: "{best.schedule}"` ({best.name}).',
    ]
    return "\n".join([*lines, *(f"Note: {note}" for note in result.notes)])


def figure_png(result: SearchResult) -> bytes:
    """Change of the velocity along the flow, and how far the candidates' paths are from the full one, as one PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = max(4.5, 0.29 * len(result.scores) + 1.2)
    widths = {"width_ratios": (1.25, 1)}
    figure, (curve, bars) = plt.subplots(1, 2, figsize=(14, height), gridspec_kw=widths, layout="constrained")
    _velocity_change(curve, result)
    _deviations(bars, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _velocity_change(axis: Any, result: SearchResult) -> None:
    """Median and middle 80 % of the change into each step; steps that the best schedule evaluates are filled."""
    best = FlowSchedule.parse(result.best.schedule)
    for (steps, rows), color in zip(result.velocity_change.items(), _COLORS, strict=False):
        low, median, high = 100 * np.array(rows).reshape(-1, 3).T
        times = np.arange(1, steps) / steps
        axis.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(times, median, "o-", color=color, markerfacecolor="white", label=f"{steps} steps")
        if steps == best.steps:
            chosen = [i - 1 for i in best.evaluated if i > 0]
            label = f"evaluated by {result.best.schedule}"
            axis.plot(times[chosen], median[chosen], "o", color=color, markersize=8, label=label)
    axis.set(xlabel="flow time t, from noise to action", ylabel="change of the velocity since the last step [%]")
    axis.set_title("how much the velocity changes from step to step", loc="left")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend()


def _deviations(axis: Any, result: SearchResult) -> None:
    scores = sorted(result.scores, key=lambda s: s.deviation_m.mean)
    rows, k = range(len(scores)), result.settings.evaluations
    means = np.array([s.deviation_m.mean for s in scores])
    spread = np.array(
        [(s.deviation_m.mean - s.deviation_m.low, s.deviation_m.high - s.deviation_m.mean) for s in scores]
    )
    colors = [_COLORS[0] if s.evaluations == k else "#c4ccd4" for s in scores]
    axis.barh(rows, means, 0.7, xerr=spread.T.clip(min=0), color=colors, ecolor="#444444", capsize=3)
    axis.set_yticks(rows, [f"{s.name}  ({s.schedule})" for s in scores], fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="mean distance from the path of the full schedule [m]")
    axis.set_title(f"candidates; dark: {k} evaluations", loc="left")
    axis.grid(alpha=0.3, axis="x")
