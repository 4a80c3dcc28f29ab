"""The errors of a quantised checkpoint's layers as a table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from flashdrive_node.training.quantisation import QuantisationReport


def markdown(report: QuantisationReport) -> str:
    """A row per layer, and the mean over them."""
    lines = ["| layer | rows x columns | error | rounded to the nearest | ratio |", "| --- | --- | --- | --- | --- |"]
    for layer in report.layers:
        lines.append(_row(layer.layer, f"{layer.rows} x {layer.columns}", layer.error, layer.nearest_error))
    count = len(report.layers)
    mean, nearest = (
        math.exp(sum(math.log(max(value, 1e-12)) for value in values) / count)
        for values in ([x.error for x in report.layers], [x.nearest_error for x in report.layers])
    )
    lines.append(_row("geometric mean", "", mean, nearest))
    lines += [
        "",
        "Norm of the outputs' error relative to the outputs' norm, on windows that were not calibrated on, of each "
        f"layer alone: inputs are the original model's. {report.checkpoint}, calibrated on {report.source}.",
    ]
    if report.left_out:
        lines.append(f"In bfloat16, because their columns make no whole groups: {', '.join(report.left_out)}.")
    return "\n".join(lines)


def _row(name: str, size: str, error: float, nearest: float) -> str:
    ratio = f"{error / nearest:.2f}" if nearest > 0 else "-"
    return f"| {name} | {size} | {100 * error:.2f} % | {100 * nearest:.2f} % | {ratio} |"


def write_report(report: QuantisationReport, directory: Path) -> None:
    """``quantisation.json`` and ``quantisation.md``, beside the weights."""
    (directory / "quantisation.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    (directory / "quantisation.md").write_text(markdown(report) + "\n", encoding="utf-8")
