"""The errors of a quantised checkpoint's layers as a table, as a picture and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

from flashdrive_node.model.precision import FP8, W4A8
from flashdrive_node.training.quantisation import LayerError, QuantisationReport
from flashdrive_node.training.stack_error import StackError
from flashdrive_node.training.stack_refinement import ALONE, IN_ORDER, TUNED

#: Colour and marker of the result, of what it was before the second stage, and of rounding to the nearest.
_STYLES = (("#2a6f4e", "o"), ("#8aa7c4", "s"), ("#c63a3a", "x"))
_LABELS = ("result", "before the second stage", "rounded to the nearest")
#: Names of the stages, and titles of the formats.
_STAGES = {ALONE: "fitted alone", IN_ORDER: "rounded in order", TUNED: "with scales learned together"}
_BITS = {W4A8: "4-bit layers", FP8: "Layers in 8-bit floats"}


def markdown(report: QuantisationReport) -> str:
    """A row per layer, and the mean over them."""
    lines = []
    for kind, layers in by_format(report).items():
        lines += [
            f"{_BITS[kind]}:",
            "",
            "| layer | rows x columns | error | before the second stage | rounded to the nearest | ratio |",
            "| --- | --- | --- | --- | --- | --- |",
            *(_row(x.layer, f"{x.rows} x {x.columns}", errors_of(x)) for x in layers),
            _row("geometric mean", "", mean_errors(layers)),
            "",
        ]
    if report.layers:
        lines.append(
            "Norm of the outputs' error relative to the outputs' norm, on windows that were not calibrated on, of "
            "each layer alone: inputs are the original model's, rounded to 8-bit integers where the format does that, "
            f"and as they are in front of 8-bit floats. {report.checkpoint}, calibrated on {report.source}."
        )
    if report.together:
        lines += ["", *_together(report.together), ""]
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


def _together(errors: Mapping[str, StackError]) -> list[str]:
    """Of all text layers, stage by stage."""
    return [
        "All 4-bit layers together on those windows:",
        "",
        "| layers | keys and values | states | velocities | their sums | divergence, nats | other tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {_STAGES[stage]} | {100 * e.keys_values:.2f} % | {100 * e.states:.2f} % | {100 * e.velocity:.2f} % | "
            f"{100 * e.summed:.2f} % | {e.divergence:.6f} | {e.changed} of {e.tokens} |"
            for stage, e in errors.items()
        ),
        "",
        "Relative norms of what they change: in keys and values of all layers, in the states that texts are drawn "
        "from, in the flow's velocities, and in the sums of these along the path; by how much the distribution of a "
        "text's next token diverges, and behind how many tokens another one is the likeliest.",
    ]


def by_format(report: QuantisationReport) -> dict[str, list[LayerError]]:
    """Layers of each format, in the order of the model."""
    layers: dict[str, list[LayerError]] = {}
    for layer in report.layers:
        layers.setdefault(layer.format, []).append(layer)
    return layers


def errors_of(layer: LayerError) -> tuple[float, float | None, float]:
    """Of the result, before the second stage where there is one, and of rounding to the nearest."""
    return layer.error, layer.rotated_error, layer.nearest_error


def mean_errors(layers: Sequence[LayerError]) -> list[float | None]:
    """Geometric means over layers, as in `errors_of`."""
    columns = ([e for e in errors if e is not None] for errors in zip(*map(errors_of, layers), strict=True))
    return [math.exp(sum(math.log(max(e, 1e-12)) for e in c) / len(c)) if c else None for c in columns]


def _row(name: str, size: str, errors: Sequence[float | None]) -> str:
    error, _, nearest = errors
    ratio = f"{error / nearest:.2f}" if error is not None and nearest else "-"
    shown = " | ".join("-" if e is None else f"{100 * e:.2f} %" for e in errors)
    return f"| {name} | {size} | {shown} | {ratio} |"


def draw(report: QuantisationReport, path: Path) -> None:
    """The errors of every layer, formats one below the other."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    parts = by_format(report)
    width = max(6.0, 0.2 * max(map(len, parts.values())) + 2)
    figure, axes = plt.subplots(len(parts), figsize=(width, 4.2 * len(parts)), layout="constrained", squeeze=False)
    for axis, (kind, layers) in zip(axes[:, 0], parts.items(), strict=True):
        for label, (colour, marker), errors in zip(
            _LABELS, _STYLES, zip(*map(errors_of, layers), strict=True), strict=True
        ):
            met = [(place, 100 * e) for place, e in enumerate(errors) if e is not None]
            if met:
                axis.plot(*zip(*met, strict=True), marker, color=colour, label=label, markersize=5)
        axis.set_xticks(range(len(layers)), [_short(layer.layer) for layer in layers], rotation=90, fontsize=7)
        axis.set_ylabel("error of the layer's outputs, %")
        axis.set_ylim(bottom=0)
        axis.margins(x=0.01)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=8)
        axis.set_title(f"{_BITS[kind]}, calibrated on {report.source}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(report: QuantisationReport, directory: Path) -> None:
    """``quantisation.json``, ``.md`` and, where layers were fitted, ``.png``, beside the weights."""
    (directory / "quantisation.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    (directory / "quantisation.md").write_text(markdown(report) + "\n", encoding="utf-8")
    if report.layers:
        draw(report, directory / "quantisation.png")


def _short(layer: str) -> str:
    """On the axis."""
    for long, short in (("layers.", ""), ("blocks.", ""), ("language.", "text "), ("_mergers", ""), (".", " ")):
        layer = layer.replace(long, short)
    return layer
