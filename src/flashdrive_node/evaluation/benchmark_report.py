"""What a benchmark found, as JSON and as tables for a README."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashdrive_node.evaluation.benchmark import GIB, Measurement, StageTimes
from flashdrive_node.evaluation.configurations import CONFIGURATIONS
from flashdrive_node.evaluation.roofline import Ceilings, Floor, Workload
from flashdrive_node.model.errors import InputError

#: Stages in their order; "other" is what no stage accounts for.
STAGES = ("images", "encode", "prefill", "decode", "action", "other")

_WITH_FLOOR = STAGES[:-1]


@dataclass
class Report:
    """Everything that one run found, with the conditions that it was found under."""

    conditions: dict[str, str]
    ceilings: Ceilings
    measurements: list[Measurement] = field(default_factory=list)
    load: dict[str, float] = field(default_factory=dict)
    #: Configurations that could not be measured ("all, 6 samples"), and why.
    failures: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """The whole report."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_report(path: Path) -> Report:
    """A report from its JSON file.

    Raises:
        InputError: The file is none.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measurements = [_measurement(m) for m in content.pop("measurements")]
        return Report(ceilings=Ceilings(**content.pop("ceilings")), measurements=measurements, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: benchmark.json of this command is required, found {error!r}") from error


def _measurement(content: dict[str, Any]) -> Measurement:
    work = content.pop("work")
    work = Workload(patches=tuple(work.pop("patches")), **work)
    stages = {stage: StageTimes(**times) for stage, times in content.pop("stages").items()}
    floors = {stage: Floor(**floor) for stage, floor in content.pop("floors").items()}
    return Measurement(work=work, stages=stages, floors=floors, **content)


def markdown(report: Report) -> str:
    """The report as text: latencies, the roofline of every stage, and the conditions."""
    parts = [_latencies(report), _roofline(report), _footnote(report)]
    if report.load:
        parts.append("Loading: " + ", ".join(f"{k} {v:.2f}" for k, v in report.load.items()) + ".")
    parts += [f"Not measured: {name}: {reason}" for name, reason in report.failures.items()]
    return "\n\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _latencies(report: Report) -> str:
    head = ["configuration", "samples", "", *STAGES, "per pass", "total", "floor", "ratio", "peak GiB"]
    rows = []
    for m in report.measurements:
        for name in ("p50", "p99"):
            first = name == "p50"
            total = getattr(m.stages["total"], f"{name}_ms")
            floor = m.floors["total"].ms
            rows.append(
                [
                    CONFIGURATIONS[m.configuration].title if first else "",
                    str(m.samples) if first else "",
                    name,
                    *(f"{getattr(m.stages[s], f'{name}_ms'):.1f}" if s in m.stages else "" for s in STAGES),
                    f"{getattr(m.stages['decode'], f'{name}_ms') / m.passes:.2f}",
                    f"**{total:.1f}**" if first else f"{total:.1f}",
                    f"{floor:.1f}" if first else "",
                    f"{total / floor:.2f}" if first else "",
                    f"{m.peak_memory_bytes / GIB:.1f}" if first and m.peak_memory_bytes else "",
                ]
            )
    return _table(head, rows)


def _roofline(report: Report) -> str:
    """Per configuration what it moves and computes, and each stage's floor with the measured median's ratio to it."""
    rows = []
    for m in report.measurements:
        total = m.floors["total"]
        cells = [f"{m.floors[s].ms:.2f} ({m.stages[s].p50_ms / m.floors[s].ms:.1f})" for s in (*_WITH_FLOOR, "total")]
        amounts = [f"{total.bytes / 1e9:.3g}", f"{total.flops / 1e12:.3g}"]
        rows.append([CONFIGURATIONS[m.configuration].title, str(m.samples), *amounts, *cells])
    head = ["floor (measured / floor)", "samples", "GB", "TFLOP", *_WITH_FLOOR, "total"]
    return _table(head, rows)


def _footnote(report: Report) -> str:
    c = report.ceilings
    sentences = [
        "Milliseconds; decode per pass is per token, and per round where speculative.",
        "The floor is arithmetic on what every stage must move and compute, with the ceilings that this device showed "
        f"in the same run: {c.flops_per_s / 1e12:.3g} TFLOP/s in a large matrix product, {c.bytes_per_s / 1e12:.3g} "
        f"TB/s in a large copy (read and written), {c.upload_bytes_per_s / 1e9:.3g} GB/s from the host.",
        "; ".join(f"{k}: {v}" for k, v in report.conditions.items()) + ".",
    ]
    for m in report.measurements:
        if m.samples == report.measurements[0].samples:
            sentences.append(
                f"{CONFIGURATIONS[m.configuration].title}: {m.work.computed_tokens} of {m.work.prompt_tokens} prompt "
                f"tokens computed, warm-up {m.warm_up_s:.1f} s, reset {m.reset_ms:.2f} ms."
            )
    return " ".join(sentences)
