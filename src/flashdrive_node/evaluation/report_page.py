"""Writes a replay report: report.json, summary.png and one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from flashdrive_node.evaluation import html
from flashdrive_node.evaluation.bag_truth import read_truth
from flashdrive_node.evaluation.metrics import Percentiles
from flashdrive_node.evaluation.replay_report import (
    Outputs,
    ReplayReport,
    read_driven_path,
    read_outputs,
)
from flashdrive_node.evaluation.truth import ReasoningScore
from flashdrive_node.runtime.rig import Rig


def write_report(report: ReplayReport, rig: Rig, folder: Path) -> dict[str, Path]:
    """Write report.json, report.html and, where anything was recorded, summary.png.

    Returns:
        The files by name.
    """
    # matplotlib takes a second to import and is not needed to read a report.
    from flashdrive_node.evaluation.report_figures import summary_png

    folder.mkdir(parents=True, exist_ok=True)
    files = {"json": folder / "report.json", "html": folder / "report.html"}
    picture = None
    outputs = Outputs([], [])
    if report.outputs:
        outputs = read_outputs(Path(report.outputs))
        bag = Path(report.bag)
        picture = summary_png(report, outputs, read_driven_path(bag, rig), read_truth(bag))
        files["png"] = folder / "summary.png"
        files["png"].write_bytes(picture)
    files["json"].write_text(report.to_json(), encoding="utf-8")
    files["html"].write_text(page(report, outputs.records, picture), encoding="utf-8")
    return files


def summary_lines(report: ReplayReport) -> list[str]:
    """The summary for a terminal."""
    lines = []
    if report.engine:
        lines.append(f"engine       {report.engine['name']} (checkpoint {report.engine['checkpoint']})")
    lines.append(f"windows      {report.published} published, withheld {_causes(report.withheld)}")
    lines.append(f"             dropped {_causes(report.dropped)}")
    for camera, frames in report.frames.items():
        lines.append(f"frames       {camera}: {_causes(frames)}")
    for label, values in _latency_rows(report):
        lines.append(f"{label:24}  p50 {values.p50:8.1f}  p95 {values.p95:8.1f}  p99 {values.p99:8.1f} ms")
    if report.distance_to_driven_m:
        text = ", ".join(f"{v:.2f} m at {k}" for k, v in report.distance_to_driven_m.items())
        lines.append(f"off the path driven       {text} (mean)")
    if report.ade_m:
        text = ", ".join(f"{v:.2f} m over {k}" for k, v in report.ade_m.items())
        lines.append(f"ADE against it            {text}")
    if report.reasoning is not None:
        lines.append(f"reasoning                 {_reasoning(report.reasoning)}")
    lines.append(f"resets       {_causes(report.resets)}")
    lines.append(f"faults       {len(report.faults)}")
    lines += [f"             {c.time_s:7.2f} s  {c.part}: {c.text}" for c in report.faults[:10]]
    lines += [f"note         {note}" for note in report.notes]
    if report.problem:
        lines.append(f"problem      {report.problem}")
    return lines


def page(report: ReplayReport, records: Sequence[dict[str, Any]], picture: bytes | None) -> str:
    """The HTML page."""
    parts = [f"<h1>Replay of {escape(Path(report.bag).name)}</h1>"]
    parts += [f"<p class='note'>{escape(note)}</p>" for note in report.notes]
    if report.problem:
        parts.append(f"<p class='bad'>{escape(report.problem)}</p>")
    parts.append(html.table([("published", report.published), *_flat(report)]))
    if picture is not None:
        parts.append(html.image(picture, "summary plots"))
    rows = _latency_rows(report)
    if rows:
        parts.append("<h2>Latency</h2>")
        figures = [(label, v.count, v.p50, v.p95, v.p99, v.max) for label, v in rows]
        parts.append(html.table(figures, ("[ms]", "windows", "p50", "p95", "p99", "max")))
        parts.append("<small>Age is on the clock of the recording; the stages are on the machine's clock.</small>")
    if report.frames:
        parts.append("<h2>Frames</h2>")
        keys = list(dict.fromkeys(key for frames in report.frames.values() for key in frames))
        parts.append(
            html.table([(c, *(f.get(k, 0) for k in keys)) for c, f in report.frames.items()], ("camera", *keys))
        )
    parts.append("<h2>States</h2>")
    changes = [(f"{c.time_s:.2f} s", c.part, c.level, c.text) for c in report.changes[:200]]
    parts.append(html.table(changes, ("time", "part", "level", "text")) if changes else "<p>none reported</p>")
    if records:
        parts.append("<h2>Reasoning</h2>")
        start, step = records[0]["t0_ns"], max(1, len(records) // 15)
        truth = read_truth(Path(report.bag)) if report.reasoning is not None else None
        texts = [
            (
                f"{(r['t0_ns'] - start) / 1e9:.1f} s",
                r["nav_text"] or "",
                r["reasoning"],
                *([truth.at(r["t0_ns"]) or ""] if truth else []),
            )
            for r in records[::step]
        ]
        parts.append(html.table(texts, ("t0", "navigation", "reasoning", *(["ground truth"] if truth else []))))
    parts.append("<h2>Conditions</h2>")
    parts.append(
        html.table([*report.conditions.items(), ("rig", report.rig), *report.engine.items(), *_played(report)])
    )
    return html.page("flashdrive_node replay", parts)


def _latency_rows(report: ReplayReport) -> list[tuple[str, Percentiles]]:
    named = {
        "age when published": report.age_ms,
        "last image to engine": report.latency_ms.get("input_to_engine"),
        "engine": report.latency_ms.get("engine"),
        "engine to published": report.latency_ms.get("publish"),
        "last image to published": report.latency_ms.get("total"),
    }
    return [(label, values) for label, values in named.items() if values is not None]


def _flat(report: ReplayReport) -> list[tuple[str, str]]:
    return [
        ("withheld", _causes(report.withheld)),
        ("dropped", _causes(report.dropped)),
        ("resets", _causes(report.resets)),
        ("faults", str(len(report.faults))),
        *((f"distance to the driven path after {k}", f"{v} m (mean)") for k, v in report.distance_to_driven_m.items()),
        *((f"ADE over {k} against the driven path", f"{v} m") for k, v in report.ade_m.items()),
        *([("reasoning against the truth", _reasoning(report.reasoning))] if report.reasoning is not None else []),
    ]


def _reasoning(score: ReasoningScore) -> str:
    return (
        f"{score.compared} texts: {score.same_cause:.0%} name the true cause or manoeuvre, {score.same_decision:.0%} "
        f"also the pace; {score.malformed:.1%} are malformed"
    )


def _played(report: ReplayReport) -> list[tuple[str, Any]]:
    return [(f"player: {k}", v) for k, v in report.played.items() if k != "messages"]


def _causes(counts: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in counts.items() if count) or "none"
