"""Writes an evaluation: evaluation.json, evaluation.md, and one HTML page with plots and the worst windows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from flashdrive_node.evaluation import html
from flashdrive_node.evaluation.clip_scores import ClipScores
from flashdrive_node.evaluation.evaluation_summary import LATENCY_FROM, Summary
from flashdrive_node.evaluation.metrics import LEVEL, Comparison, Estimate

_HORIZONS = ("1s", "3s", "5s", "6.4s")
_ERRORS = {
    "ade": "ADE, one sample",
    "min_ade": "minADE, best sample",
    "driven_ade": "ADE, sample to drive",
    "fde": "FDE, one sample",
    "min_fde": "minFDE, best sample",
    "along": "along the track",
    "across": "across the track",
}
_TEXTS = {
    "empty": "empty",
    "malformed": "malformed: cut, or with special tokens",
    "agree_with_path": "agree with their path, of those that claim a pace or a turn",
    "readable": "within the grammar of the world",
    "same_label": "of the driver's cause or manoeuvre",
    "same_decision": "of the driver's decision, pace included",
    "changed": "other than the baseline's for the same window and sample",
}
#: Problems and notes that are listed one by one.
_LISTED = 20


def write_report(summary: Summary, clips: Sequence[ClipScores], folder: Path) -> list[Path]:
    """Write the three files; pictures of the worst windows are taken from ``clips/`` in the folder.

    Returns:
        The files.
    """
    files = [folder / name for name in ("evaluation.json", "evaluation.md", "evaluation.html")]
    files[0].write_text(summary.to_json(), encoding="utf-8")
    files[1].write_text(markdown(summary) + "\n", encoding="utf-8")
    # matplotlib takes a second to import, and what stands above must not be lost where it is missing.
    from flashdrive_node.evaluation.evaluation_figures import summary_png, worst_png

    parts = [
        f"<h1>Open loop: {escape(str(summary.settings['source']))}</h1>",
        html.table(_conditions(summary)),
        html.image(summary_png(summary), "errors by horizon and window, latency, accept lengths"),
        *(f"<h2>{title}</h2>{html.table(rows, head)}" for title, head, rows in _tables(summary)),
    ]
    parts += _worst(summary, clips, folder, worst_png)
    parts += [f"<p class='bad'>{escape(line)}</p>" for line in _listed(summary.problems)]
    parts += [f"<p class='note'>{escape(line)}</p>" for line in _listed(summary.notes)]
    files[2].write_text(html.page("flashdrive evaluate", parts), encoding="utf-8")
    return files


def markdown(summary: Summary) -> str:
    """All tables as text."""
    lines = []
    for title, head, rows in _tables(summary):
        lines += [f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows] + [""]
    lines.append("; ".join(f"{name}: {value}" for name, value in _conditions(summary)) + ".")
    lines += [f"- problem: {line}" for line in _listed(summary.problems)]
    lines += [f"- note: {line}" for line in _listed(summary.notes)]
    return "\n".join(lines)


_Table = tuple[str, tuple[str, ...], list[tuple[object, ...]]]


def _tables(summary: Summary) -> list[_Table]:
    level = f"{LEVEL:.0%} interval over {summary.errors['ade@6.4s'].clips} clips"
    errors: list[tuple[object, ...]] = [
        (label, *(_metres(summary.errors[f"{name}@{h}"]) for h in _HORIZONS))
        for name, label in _ERRORS.items()
        if f"{name}@6.4s" in summary.errors
    ]
    tables: list[_Table] = [(f"Path errors [m] up to a horizon, {level}", ("", *_HORIZONS), errors)]
    if summary.compared:
        compared: list[tuple[object, ...]] = [
            (label, *(_change(summary.compared[f"{name}@{h}"]) for h in _HORIZONS))
            for name, label in _ERRORS.items()
            if all(f"{name}@{h}" in summary.compared for h in _HORIZONS)
        ]
        tables.append((f"Change against {summary.baseline}, paired by window", ("", *_HORIZONS), compared))
    texts: list[tuple[object, ...]] = [
        (label, _share(summary.texts[name])) for name, label in _TEXTS.items() if name in summary.texts
    ]
    tables.append(("Reasoning: share of the texts that are", ("", "share"), texts))
    if summary.labels:
        labels: list[tuple[object, ...]] = [
            (label.lower().replace("_", " "), f"{share:.1%}", count) for label, (share, count) in summary.labels.items()
        ]
        tables.append(("Texts that state the driver's label, by label", ("label", "share", "texts"), labels))
    times: list[tuple[object, ...]] = [
        (stage, f"{p.p50:.1f}", f"{p.p95:.1f}", f"{p.p99:.1f}", p.count) for stage, p in summary.latency_ms.items()
    ]
    title = f"Latency [ms] from window {LATENCY_FROM} of a clip on"
    if times:
        tables.append((title, ("stage", "p50", "p95", "p99", "windows"), times))
    figures: list[tuple[object, ...]] = [(name, f"{value:.3f}") for name, value in summary.metrics.items()]
    tables.append(("Means over windows", ("figure", "mean"), figures))
    return tables


def _conditions(summary: Summary) -> list[tuple[str, object]]:
    counts = f"{summary.clips} clips, {summary.windows} windows answered, {summary.scored} scored"
    return [*sorted(summary.settings.items()), ("results", counts), ("problems", len(summary.problems))]


def _metres(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _share(estimate: Estimate) -> str:
    return f"{estimate.mean:.2%} [{estimate.low:.2%}, {estimate.high:.2%}]"


def _change(comparison: Comparison) -> str:
    r = comparison.relative
    return f"{r.mean:+.1%} [{r.low:+.1%}, {r.high:+.1%}]"


def _listed(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], *([f"and {more} more"] if more > 0 else [])]


def _worst(summary: Summary, clips: Sequence[ClipScores], folder: Path, draw: object) -> list[str]:
    assert callable(draw)
    by_name = {clip.name: clip for clip in clips}
    parts = ["<h2>Furthest off: the worst window of the worst clips</h2>"] if summary.worst else []
    for name, index, ade in summary.worst:
        worst = by_name[name].worst
        assert worst is not None
        parts.append(f"<h3>{escape(name)}, window {index}: ADE {ade:.2f} m</h3>")
        picture = folder / "clips" / f"{name}.jpg"
        if picture.is_file():
            parts.append(html.image(picture.read_bytes(), f"cameras of {name}", "jpeg"))
        parts.append(html.image(draw(worst), f"paths of {name}"))
        said = [("says", text) for text in dict.fromkeys(worst.texts)]
        parts.append(html.table([*said, *([("driver", worst.sentence)] if worst.sentence else [])]))
    return parts
