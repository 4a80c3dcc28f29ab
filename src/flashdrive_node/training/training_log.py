"""What happened in a training run: figures over time, as JSON and as a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch


@dataclass
class TrainingLog:
    """Figures of one stage."""

    #: Settings, device, versions, sizes.
    conditions: dict[str, Any]
    #: Rows of seconds, step and losses.
    training: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    #: Figures at the end.
    result: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write ``training.json`` and ``training.png``."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        (directory / "training.json").write_text(text, encoding="utf-8")
        draw(self, directory / "training.png")


#: What the figures are, where their name alone does not say it.
_TITLES = {
    "text": "text: cross-entropy per token, nats",
    "flow": "flow: squared error of the velocity",
    "path": "path: the same, summed along the path",
    "seen": "seen: tokens of the vision tower",
    "understood": "understood: image tokens behind the LM",
    "decision": "decision: cross-entropy, nats",
    "geometry": "geometry: error of the read-out",
    "plan": "plan: error of the read-out",
    "gradient": "norm of the gradient, before clipping",
    "history baseline": "history baseline: path error, m",
}


def draw(log: TrainingLog, path: Path) -> None:
    """Every figure over time, training and validation; on a logarithmic scale where it spans a factor of 3 or more."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    skipped = ("seconds", "step")
    names = sorted({name for row in (*log.training, *log.validation) for name in row} - set(skipped))
    columns = 4
    rows = max(1, -(-len(names) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        values = [row[name] for row in (*log.training, *log.validation) if name in row]
        wide = 0 < 3 * min(values) < max(values)
        for table, label, colour in ((log.training, "training", "#8aa7c4"), (log.validation, "validation", "#c63a3a")):
            points = [(row["seconds"], row[name]) for row in table if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.4)
        axis.set_title(_TITLES.get(name, name), fontsize=10)
        axis.set_yscale("log" if wide else "linear")
        axis.grid(alpha=0.3, which="both")
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def mean_rows(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Column means of rows that have the same keys."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


class Stopwatch:
    """Mean duration of the parts of a loop, measured now and then, since a device must be waited for."""

    def __init__(self, device: torch.device, every: int = 20):
        """Measure every so many runs of a part."""
        self.device, self.every = device, every
        #: Seconds by part.
        self.means: dict[str, float] = {}
        self._runs: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part."""
        self._runs[name] = self._runs.get(name, 0) + 1
        if self._runs[name] % self.every:
            yield
            return
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        number = self._runs[name] // self.every
        mean = self.means.get(name, 0.0)
        self.means[name] = mean + (time.perf_counter() - started - mean) / number

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
