"""The errors of a quantised checkpoint's layers as a table, as a picture and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import matplotlib

from flashdrive_node.training.quantisation import LayerError, QuantisationReport

#: Colour and marker of the result, of what it was before the second stage, and of rounding to the nearest.
_STYLES = (("#2a6f4e", "o"), ("#8aa7c4", "s"), ("#c63a3a", "x"))


def markdown(report: QuantisationReport) -> str:
    """A row per layer, and the mean over them."""
    lines = []
    if report.layers:
        lines += [
            "| layer | rows x columns | error | before the second stage | rounded to the nearest | ratio |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_row(x.layer, f"{x.rows} x {x.columns}", *errors_of(x)) for x in report.layers]
        lines.append(_row("geometric mean", "", *mean_errors(report)))
        lines += [
            "",
            "Norm of the outputs' error relative to the outputs' norm, on windows that were not calibrated on, of each "
            f"layer alone: inputs are the original model's. {report.checkpoint}, calibrated on {report.source}.",
        ]
    if report.left_out:
        lines.append(f"In bfloat16, because their columns make no whole groups: {', '.join(report.left_out)}.")
    if report.static:
        lines.append(f"{report.static} layers have a static scale for their inputs.")
    if report.head is not None:
        head = report.head
        kept = "4 bits are kept" if head.kept else "so the head has 8 bits"
        lines.append(
            f"Output head in 4 bits: the likeliest token changed behind {head.changed} of {head.tokens} tokens, {kept}."
        )
    return "\n".join(lines)


def errors_of(layer: LayerError) -> tuple[float, float, float]:
    """Of the result, before the second stage, and of rounding to the nearest."""
    return layer.error, layer.rotated_error, layer.nearest_error


def mean_errors(report: QuantisationReport) -> list[float]:
    """Geometric means over the layers, as in `errors_of`."""
    columns = zip(*map(errors_of, report.layers), strict=True)
    return [math.exp(sum(math.log(max(e, 1e-12)) for e in errors) / len(errors)) for errors in columns]


def _row(name: str, size: str, error: float, rotated: float, nearest: float) -> str:
    ratio = f"{error / nearest:.2f}" if nearest > 0 else "-"
    return f"| {name} | {size} | {100 * error:.2f} % | {100 * rotated:.2f} % | {100 * nearest:.2f} % | {ratio} |"


def draw(report: QuantisationReport, path: Path) -> None:
    """The three errors of every layer, in the order of the model."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [layer.layer.removeprefix("language.layers.") for layer in report.layers]
    series = zip(("result", "before the second stage", "rounded to the nearest"), _STYLES, strict=True)
    figure, axis = plt.subplots(figsize=(max(6.0, 0.22 * len(names) + 3), 4.2), layout="constrained")
    for (label, (colour, marker)), errors in zip(series, zip(*map(errors_of, report.layers), strict=True), strict=True):
        axis.plot(range(len(names)), [100 * e for e in errors], marker, color=colour, label=label, markersize=5)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_ylabel("error of the layer's outputs, %")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
    axis.set_title(f"4-bit layers, calibrated on {report.source}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(report: QuantisationReport, directory: Path) -> None:
    """``quantisation.json``, ``.md`` and, of layers in 4 bits, ``.png``, beside the weights."""
    (directory / "quantisation.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    (directory / "quantisation.md").write_text(markdown(report) + "\n", encoding="utf-8")
    if report.layers:
        draw(report, directory / "quantisation.png")
