"""Times of products in every format of a weight, side by side."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import matplotlib
import torch
from tqdm import tqdm

from flashdrive_node.evaluation.format_cases import Calls, FormatCase
from flashdrive_node.evaluation.kernel_benchmark import pass_ms

#: Calls in a graph at least, whose launch takes as long as a small kernel.
_CALLS = 16


@dataclass(frozen=True)
class FormatTime:
    """One shape."""

    name: str
    tokens: int
    #: Microseconds of one call, by format or tiling.
    us: dict[str, float]
    #: At which rate the weight was read, by the same; nothing for what has no weight.
    gigabytes_per_s: dict[str, float]


def measure_formats(cases: Iterable[FormatCase], device: torch.device, repeats: int = 20) -> list[FormatTime]:
    """Time every case, as `measure_kernels` does."""
    times = []
    with torch.inference_mode():
        for case in tqdm(cases, desc="formats", unit="case"):
            us = {name: _call_us(calls, device, repeats) for name, calls in case.calls.items()}
            rates = {
                name: case.weight_bytes[name] / time / 1e3 for name, time in us.items() if name in case.weight_bytes
            }
            times.append(FormatTime(case.name, case.tokens, us, rates))
    return times


def _call_us(calls: Calls, device: torch.device, repeats: int) -> float:
    many = [*calls] * -(-_CALLS // len(calls)) if device.type == "cuda" else calls
    return 1e3 * pass_ms(many, device, repeats) / len(many)


def format_markdown(times: Sequence[FormatTime], columns: Sequence[str]) -> str:
    """A table in microseconds, one line per shape, the fastest format in bold."""
    head = ["shape", "tokens", *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for t in times:
        best = min(t.us.values())
        cells = [_cell(t.us.get(name), best) for name in columns]
        lines.append("| " + " | ".join([t.name, str(t.tokens), *cells]) + " |")
    return "\n".join(lines)


def best_markdown(times: Sequence[FormatTime], count: int = 3) -> str:
    """The fastest few of each shape's variants."""
    lines = ["| shape | tokens | fastest, microseconds |", "|---|---|---|"]
    for t in times:
        fastest = sorted(t.us.items(), key=lambda pair: pair[1])[:count]
        lines.append(f"| {t.name} | {t.tokens} | " + "; ".join(f"{us:.1f}: {name}" for name, us in fastest) + " |")
    return "\n".join(lines)


def format_json(times: Sequence[FormatTime], conditions: dict[str, str]) -> str:
    """Times with what they were measured on."""
    return json.dumps({"conditions": conditions, "products": [asdict(t) for t in times]}, indent=1)


def format_figure(times: Sequence[FormatTime], columns: Sequence[str], title: str) -> bytes:
    """One panel per shape, time over tokens, a line per format, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(t.name for t in times))
    rows = -(-len(names) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.1 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for name, axis in zip(names, axes.flat, strict=False):
        shape = [t for t in times if t.name == name]
        for i, column in enumerate(columns):
            points = [(t.tokens, t.us[column]) for t in shape if column in t.us]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=4, color=f"C{i}", label=column)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=11, loc="left")
        axis.set_xlabel("tokens")
        axis.set_ylabel("microseconds")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _cell(us: float | None, best: float) -> str:
    if us is None:
        return "–"
    return f"**{us:.1f}**" if us == best else f"{us:.1f}"
