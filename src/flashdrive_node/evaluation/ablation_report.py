"""Writes an ablation: ablation.json, ablation.md and ablation.png."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from flashdrive_node.evaluation.ablation import CLOSED_LOOP, SAME_AS, Ablation
from flashdrive_node.evaluation.metrics import Estimate

#: Stages of the table, in order.
_STAGES = ("images", "encode", "prefill", "decode", "action", "total")
_SHARES = {
    "empty": "empty",
    "malformed": "malformed",
    "same_label": "cause right",
    "agree_with_path": "agrees",
    "changed": "changed",
}
_COLORS = ("#222222", "#9a9a9a", "#c04f3c", "#e0872b", "#d9b23c", "#4a9d5b", "#2fa3a3", "#2b6fb3", "#8a4f9e", "#c774ad")
_FAULTS = {"at_fault_collision": "#c04f3c", "off_road": "#8a4f9e", "red_light": "#e0872b", "stop_sign": "#2b6fb3"}


def write_ablation(ablation: Ablation, folder: Path) -> list[Path]:
    """Write the three files."""
    files = [folder / name for name in ("ablation.json", "ablation.md", "ablation.png")]
    files[0].write_text(ablation.to_json(), encoding="utf-8")
    files[1].write_text(markdown(ablation) + "\n", encoding="utf-8")
    files[2].write_bytes(figure_png(ablation))
    return files


def markdown(ablation: Ablation) -> str:
    """The tables, and their conditions."""
    lines = [*_open_loop(ablation), ""]
    if ablation.drives:
        lines += [*_closed_loop(ablation), ""]
    names = list(ablation.summaries)
    first = ablation.summaries[names[0]]
    counts = ", ".join(f"{name} {s.clips} clips, {s.scored} windows" for name, s in ablation.summaries.items())
    lines.append(
        f"{first.settings['source']}; changes against {names[0]}, paired by window, 95 % over clips; {counts}."
    )
    for name, summary in ablation.summaries.items():
        if (other := summary.settings.get(SAME_AS, name)) != name:
            lines.append(f"- {name} is the function of {other}: answered once, its latency is its own")
    for name, found in ablation.agreement.items():
        lines.append(
            f"- {name}: the engine itself, window by window, gives {found.texts:.1%} of the texts and an ADE "
            f"{found.ade_m:.4f} m apart on {found.windows} of these windows"
        )
    lines += [f"- {name}: {problem}" for name, s in ablation.summaries.items() for problem in s.problems[:5]]
    return "\n".join(lines)


def _open_loop(ablation: Ablation) -> list[str]:
    stages = [s for s in _STAGES if any(s in summary.latency_ms for summary in ablation.summaries.values())]
    head = ["configuration", "ADE@6.4s", "change", "minADE@6.4s", "change", *_SHARES.values(), "accepted"]
    rows = []
    for name, summary in ablation.summaries.items():
        cells = [name]
        for error in ("ade@6.4s", "min_ade@6.4s"):
            change = summary.compared.get(error)
            cells.append(str(summary.errors[error]))
            relative = change.relative if change else None
            cells.append(f"{relative.mean:+.1%} [{relative.low:+.1%}, {relative.high:+.1%}]" if relative else "")
        cells += [f"{summary.texts[share].mean:.2%}" if share in summary.texts else "" for share in _SHARES]
        accepted = summary.metrics.get("accept_length")
        cells.append("" if accepted is None else f"{accepted:.2f}")
        rows.append(cells + [f"{summary.latency_ms[s].p50:.1f}" if s in summary.latency_ms else "" for s in stages])
    return _table([*head, *(f"{stage} ms" for stage in stages)], rows)


def _closed_loop(ablation: Ablation) -> list[str]:
    scenes = next(iter(ablation.drives.values())).figures["scene_score"].clips
    rows = []
    for name, driven in ablation.drives.items():
        cells = [name]
        for figure in CLOSED_LOOP:
            apart = driven.differences.get(figure)
            cells.append(_percent(driven.figures[figure]) + (f"; {_percent(apart, '+')}" if apart else ""))
        rows.append([*cells, f"{100 * driven.malformed:.2f}"])
    title = f"Closed loop, {scenes} scenes, % [95 % over scenes]; behind the semicolon the paired difference in points"
    return [title, "", *_table(["configuration", *CLOSED_LOOP.values(), "malformed texts"], rows)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def _percent(e: Estimate, sign: str = "") -> str:
    return f"{100 * e.mean:{sign}.1f} [{100 * e.low:{sign}.1f}, {100 * e.high:{sign}.1f}]"


def figure_png(ablation: Ablation) -> bytes:
    """Change of the errors, error over the windows of a clip, and what there is of latencies and of closed loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [_changes, _drift]
    if any(summary.latency_ms for summary in ablation.summaries.values()):
        panels.insert(1, _latencies)
    if ablation.drives:
        panels.append(_drives)
    rows = math.ceil(len(panels) / 2)
    height = rows * (2.2 + 0.4 * len(ablation.summaries))
    figure, axes = plt.subplots(rows, 2, figsize=(14, height), layout="constrained", squeeze=False)
    for panel, axis in itertools.zip_longest(panels, axes.flat):
        if panel is None:
            axis.set_axis_off()
        else:
            panel(axis, ablation)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()


def _changes(axis: Any, ablation: Ablation) -> None:
    names = list(ablation.summaries)
    for offset, error, label, color in (
        (-0.15, "ade@6.4s", "ADE", "#2b6fb3"),
        (0.15, "min_ade@6.4s", "minADE", "#e0872b"),
    ):
        for row, name in enumerate(names):
            change = ablation.summaries[name].compared.get(error)
            if change is not None:
                r = change.relative
                reach = np.abs([[100 * (r.mean - r.low)], [100 * (r.high - r.mean)]])
                shown = label if row == 1 else None
                axis.errorbar(100 * r.mean, row + offset, xerr=reach, fmt="o", color=color, capsize=3, label=shown)
    axis.axvline(0, color="#222222", linewidth=0.8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_yticks(range(len(names)), names)
    axis.set(title=f"change of the error at 6.4 s against {names[0]}", xlabel="[%]")
    if len(names) > 1:
        axis.legend(fontsize=8)


def _latencies(axis: Any, ablation: Ablation) -> None:
    names = list(ablation.summaries)
    rows, ends = np.arange(len(names)), np.zeros(len(names))
    for stage, color in zip(_STAGES[:-1], ("#c7d9ea", "#9cc3e6", "#2b6fb3", "#e0872b", "#4a9d5b"), strict=True):
        widths = [s.latency_ms[stage].p50 if stage in s.latency_ms else 0.0 for s in ablation.summaries.values()]
        axis.barh(rows, widths, left=ends, color=color, label=stage)
        ends += np.array(widths)
    axis.set_yticks(rows, names)
    axis.invert_yaxis()
    axis.set(title="latency by stage, p50, one engine on its own", xlabel="[ms]")
    axis.legend(fontsize=8)


def _drift(axis: Any, ablation: Ablation) -> None:
    """Error by place in the clip of every function that there is, as a change against the first."""
    (first, baseline), *others = ablation.summaries.items()
    expected = dict(baseline.by_window["ade@6.4s"])
    for (name, summary), color in zip(others, _COLORS[1:], strict=False):
        if summary.settings.get(SAME_AS, name) == name:
            curve = [(at, e.mean / expected[at].mean - 1) for at, e in summary.by_window["ade@6.4s"] if at in expected]
            places, changes = [at for at, _ in curve], [100 * change for _, change in curve]
            axis.plot(places, changes, "o-", color=color, label=name, ms=3)
    axis.axhline(0, color="#222222", linewidth=0.8)
    axis.set(
        title=f"ADE by place of the window in its clip, against {first} (drift)",
        xlabel="first window of ten",
        ylabel="[%]",
    )
    axis.grid(alpha=0.3)
    if others:
        axis.legend(fontsize=8, ncols=2)


def _drives(axis: Any, ablation: Ablation) -> None:
    names = list(ablation.drives)
    for offset, (name, color) in zip((-0.3, -0.1, 0.1, 0.3), _FAULTS.items(), strict=True):
        found = [ablation.drives[n].figures[name] for n in names]
        reach = 100 * np.array([[e.mean - e.low for e in found], [e.high - e.mean for e in found]])
        at, widths = np.arange(len(names)) + offset, [100 * e.mean for e in found]
        axis.barh(at, widths, 0.19, xerr=reach.clip(min=0), color=color, capsize=2, label=CLOSED_LOOP[name])
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    # Without any fault the axis would be as wide as nothing.
    axis.set(title="closed loop: scenes with a fault", xlabel="[%]", xlim=(0, max(1.0, axis.get_xlim()[1])))
    axis.legend(fontsize=8)
