"""What each shortcut costs and gains: configurations side by side, each paired with the first."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flashdrive_node.evaluation.evaluation import ResultFolder
from flashdrive_node.evaluation.evaluation_summary import Summary, add_baseline, summarise

#: Stages of the table, in order.
_STAGES = ("images", "encode", "prefill", "decode", "action", "total")
_SHARES = {"empty": "empty", "malformed": "malformed", "same_label": "cause right", "agree_with_path": "agrees"}


@dataclass(frozen=True)
class Ablation:
    """Summaries by the configurations' names; the first is what the others are compared with."""

    summaries: dict[str, Summary]

    def to_json(self) -> str:
        """Indented JSON."""
        return json.dumps({name: asdict(s) for name, s in self.summaries.items()}, indent=2, ensure_ascii=False) + "\n"


def read_ablation(folder: Path, names: Sequence[str]) -> Ablation:
    """Put together what there is of some configurations.

    Args:
        folder: Holds a result folder per name.
        names: The first is the baseline.

    Raises:
        InputError: A configuration has no results, or none on the windows of the baseline.
    """
    results = {name: ResultFolder(folder / name) for name in names}
    clips = {name: result.read() for name, result in results.items()}
    summaries = {name: summarise(results[name].settings(), clips[name]) for name in names}
    first = names[0]
    for name in names[1:]:
        add_baseline(summaries[name], clips[name], first, clips[first])
    return Ablation(summaries)


def markdown(ablation: Ablation) -> str:
    """The table, and its conditions."""
    names = list(ablation.summaries)
    stages = [s for s in _STAGES if any(s in summary.latency_ms for summary in ablation.summaries.values())]
    head = ["configuration", "ADE@6.4s", "change", "minADE@6.4s", "change", *_SHARES.values(), "accepted"]
    head += [f"{stage} ms" for stage in stages]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
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
        cells += [f"{summary.latency_ms[s].p50:.1f}" if s in summary.latency_ms else "" for s in stages]
        lines.append("| " + " | ".join(cells) + " |")
    first = ablation.summaries[names[0]]
    counts = ", ".join(f"{name} {s.clips} clips, {s.scored} windows" for name, s in ablation.summaries.items())
    lines += [
        "",
        f"{first.settings['source']}; changes against {names[0]}, paired by window, 95 % over clips; {counts}.",
    ]
    problems = [f"- {name}: {problem}" for name, s in ablation.summaries.items() for problem in s.problems[:5]]
    return "\n".join([*lines, *problems])


def figure_png(ablation: Ablation) -> bytes:
    """Change of the errors against the first configuration, and latency by stage."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(ablation.summaries)
    rows = np.arange(len(names))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.6 + 0.45 * len(names)), layout="constrained", sharey=True)
    for offset, error, label, color in (
        (-0.15, "ade@6.4s", "ADE", "#2b6fb3"),
        (0.15, "min_ade@6.4s", "minADE", "#e0872b"),
    ):
        for row, name in enumerate(names):
            change = ablation.summaries[name].compared.get(error)
            if change is None:
                continue
            r = change.relative
            reach = [[100 * (r.mean - r.low)], [100 * (r.high - r.mean)]]
            shown = label if row == 1 else None
            left.errorbar(100 * r.mean, row + offset, xerr=np.abs(reach), fmt="o", color=color, capsize=3, label=shown)
    left.axvline(0, color="#222222", linewidth=0.8)
    left.set_yticks(rows, names)
    left.invert_yaxis()
    left.set(title=f"change of the error at 6.4 s against {names[0]}", xlabel="[%]")
    left.legend(fontsize=8)
    ends = np.zeros(len(names))
    colors = ("#c7d9ea", "#9cc3e6", "#2b6fb3", "#e0872b", "#4a9d5b")
    for stage, color in zip(_STAGES[:-1], colors, strict=True):
        widths = [s.latency_ms[stage].p50 if stage in s.latency_ms else 0.0 for s in ablation.summaries.values()]
        right.barh(rows, widths, left=ends, color=color, label=stage)
        ends += np.array(widths)
    right.set(title="latency by stage, p50", xlabel="[ms]")
    right.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()


def write_ablation(ablation: Ablation, folder: Path) -> list[Path]:
    """Write ablation.json, ablation.md and ablation.png."""
    files = [folder / name for name in ("ablation.json", "ablation.md", "ablation.png")]
    files[0].write_text(ablation.to_json(), encoding="utf-8")
    files[1].write_text(markdown(ablation) + "\n", encoding="utf-8")
    files[2].write_bytes(figure_png(ablation))
    return files
