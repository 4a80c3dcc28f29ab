"""Writes a replay report: report.json, summary.png and one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flashdrive_node.evaluation.replay_report import (
    Outputs,
    Percentiles,
    ReplayReport,
    read_driven_path,
    read_outputs,
)
from flashdrive_node.runtime.rig import Rig

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 1.8em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } td, th { padding: .2em .9em .2em 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.note { background: #fff4d6; border-left: 4px solid #e0a030; padding: .6em 1em; margin: 1em 0; }
.bad { background: #fbe3e3; border-left: 4px solid #c63a3a; padding: .6em 1em; white-space: pre-wrap; }
.ERROR { color: #b02020; } .WARN { color: #a06800; } img { max-width: 100%; } small { color: #666; }
"""


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
        picture = summary_png(report, outputs, read_driven_path(Path(report.bag), rig))
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
    parts.append(_table([("published", report.published), *_flat(report)]))
    if picture is not None:
        data = base64.b64encode(picture).decode("ascii")
        parts.append(f"<img alt='summary plots' src='data:image/png;base64,{data}'>")
    rows = _latency_rows(report)
    if rows:
        parts.append("<h2>Latency</h2>")
        figures = [(label, v.count, v.p50, v.p95, v.p99, v.max) for label, v in rows]
        parts.append(_table(figures, ("[ms]", "windows", "p50", "p95", "p99", "max")))
        parts.append("<small>Age is on the clock of the recording; the stages are on the machine's clock.</small>")
    if report.frames:
        parts.append("<h2>Frames</h2>")
        keys = list(dict.fromkeys(key for frames in report.frames.values() for key in frames))
        parts.append(_table([(c, *(f.get(k, 0) for k in keys)) for c, f in report.frames.items()], ("camera", *keys)))
    parts.append("<h2>States</h2>")
    changes = [(f"{c.time_s:.2f} s", c.part, c.level, c.text) for c in report.changes[:200]]
    parts.append(_table(changes, ("time", "part", "level", "text")) if changes else "<p>none reported</p>")
    if records:
        parts.append("<h2>Reasoning</h2>")
        start, step = records[0]["t0_ns"], max(1, len(records) // 15)
        texts = [(f"{(r['t0_ns'] - start) / 1e9:.1f} s", r["nav_text"] or "", r["reasoning"]) for r in records[::step]]
        parts.append(_table(texts, ("t0", "navigation", "reasoning")))
    parts.append("<h2>Conditions</h2>")
    parts.append(_table([*report.conditions.items(), ("rig", report.rig), *report.engine.items(), *_played(report)]))
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>flashdrive_node replay</title>"
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


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
    ]


def _played(report: ReplayReport) -> list[tuple[str, Any]]:
    return [(f"player: {k}", v) for k, v in report.played.items() if k != "messages"]


def _causes(counts: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in counts.items() if count) or "none"


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    lines = ["<table>"]
    if head:
        lines.append("<tr>" + "".join(f"<th{_kind(h, i)}>{escape(h)}</th>" for i, h in enumerate(head)) + "</tr>")
    for row in rows:
        lines.append("<tr>" + "".join(f"<td{_kind(v, i)}>{escape(str(v))}</td>" for i, v in enumerate(row)) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _kind(value: Any, column: int) -> str:
    if value in ("ERROR", "WARN"):
        return f" class='{value}'"
    return " class='n'" if column and isinstance(value, int | float) else ""
