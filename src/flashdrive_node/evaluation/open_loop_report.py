"""Tables of open-loop windows: every policy on the same windows, by class of the expert's decision."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flashdrive_node.evaluation.metrics import Estimate, bootstrap_ratio
from flashdrive_node.evaluation.open_loop import WindowRow
from flashdrive_node.evaluation.world_windows import WindowChoice

#: Path errors of the tables, and what they are called.
ERRORS: Mapping[str, str] = {
    "ade@6.4s": "ADE@6.4s",
    "min_ade@6.4s": "minADE@6.4s",
    "fde@6.4s": "FDE@6.4s",
    "ade@3s": "ADE@3s",
    "along@6.4s": "along the road",
    "across@6.4s": "across",
}
#: Shares of the texts, and what they are called.
TEXTS: Mapping[str, str] = {
    "cause_right": "decision right",
    "decision_right": "decision and pace right",
    "malformed": "malformed text",
    "empty": "empty text",
}


#: Fields of a row that say in which sample it is, and how often decisions are in them.
SAMPLES: Mapping[str, str] = {"natural": "as they occur", "balanced": "all decisions equally often"}


class OpenLoopReport(NamedTuple):
    """Windows answered by several policies."""

    choice: WindowChoice
    #: By policy, the same windows in the same order.
    rows: Mapping[str, Sequence[WindowRow]]
    conditions: Mapping[str, Any]

    def sample(self, policy: str, name: str) -> dict[str, Estimate]:
        """Figures over one of `SAMPLES`."""
        return figures([row for row in self.rows[policy] if getattr(row, name)])

    def by_decision(self, policy: str) -> dict[str, dict[str, Estimate]]:
        """Figures by class of the expert's decision, over all windows."""
        groups: dict[str, list[WindowRow]] = defaultdict(list)
        for row in self.rows[policy]:
            groups[row.label].append(row)
        return {label: figures(groups[label]) for label in sorted(groups)}

    def confusion(self, policy: str) -> dict[str, dict[str, int]]:
        """How often each class was stated in place of each one; texts that state none under "none"."""
        table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for row in self.rows[policy]:
            if row.text is not None:
                table[row.label][row.stated or "none"] += 1
        return {label: dict(stated) for label, stated in sorted(table.items())}


def figures(rows: Sequence[WindowRow]) -> dict[str, Estimate]:
    """Means over windows with intervals over scenes, whose windows resemble each other; empty without windows."""
    if not rows:
        return {}
    scenes: dict[int, list[WindowRow]] = defaultdict(list)
    for row in rows:
        scenes[row.index].append(row)
    counts = [len(group) for group in scenes.values()]

    def mean(value: Callable[[WindowRow], float]) -> Estimate:
        return bootstrap_ratio([sum(value(row) for row in group) for group in scenes.values()], counts)

    found = {name: mean(_error(name)) for name in rows[0].errors}
    if rows[0].text is not None:
        found["cause_right"] = mean(lambda row: bool(row.cause_right))
        found["decision_right"] = mean(lambda row: bool(row.decision_right))
        found["malformed"] = mean(lambda row: row.stated is None)
        found["empty"] = mean(lambda row: not (row.text or "").strip())
    return found


def _error(name: str) -> Callable[[WindowRow], float]:
    return lambda row: row.errors[name]


def as_json(report: OpenLoopReport) -> dict[str, Any]:
    """Everything, for a file."""

    def plain(values: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: e._asdict() for name, e in values.items()}

    return {
        "conditions": dict(report.conditions),
        "windows": vars(report.choice),
        "policies": {
            policy: {
                **{name: plain(report.sample(policy, name)) for name in SAMPLES},
                "by_decision": {label: plain(values) for label, values in report.by_decision(policy).items()},
                "stated_by_decision": report.confusion(policy),
                "windows": [vars(row) for row in rows],
            }
            for policy, rows in report.rows.items()
        },
    }


def markdown(report: OpenLoopReport) -> str:
    """Tables and what one must know to read them."""
    policies = list(report.rows)
    first = report.rows[policies[0]]
    scenes = len({row.index for row in first})
    lines = [
        f"Open loop: {len(first)} windows of {scenes} scenes of the {report.choice.split} split. Metres and %, mean "
        "over windows [95 % bootstrap interval over scenes].",
    ]
    for sample, title in SAMPLES.items():
        columns = {policy: report.sample(policy, sample) for policy in policies}
        windows = sum(getattr(row, sample) for row in first)
        lines += ["", f"| {title} ({windows} windows) | " + " | ".join(policies) + " |"]
        lines.append("|---|" + "---|" * len(policies))
        for name, text in {**ERRORS, **TEXTS}.items():
            if any(name in values for values in columns.values()):
                cells = [_cell(name, values.get(name)) for values in columns.values()]
                lines.append(f"| {text} | " + " | ".join(cells) + " |")
    lines += ["", *_decision_table(report)]
    return "\n".join(lines)


def _decision_table(report: OpenLoopReport) -> list[str]:
    policies = list(report.rows)
    tables = {policy: report.by_decision(policy) for policy in policies}
    titles = [f"{policy}: ADE" for policy in policies]
    talks = [policy for policy in policies if any(row.text is not None for row in report.rows[policy])]
    titles += [f"{policy}: {TEXTS[name]} %" for policy in talks for name in ("cause_right", "decision_right")]
    lines = ["| decision | windows | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(titles)]
    counts = Counter(row.label for row in report.rows[policies[0]])
    for label in tables[policies[0]]:
        cells = [f"{tables[policy][label]['ade@6.4s'].mean:.2f}" for policy in policies]
        for policy in talks:
            cells += [f"{100 * tables[policy][label][name].mean:.1f}" for name in ("cause_right", "decision_right")]
        lines.append(f"| {label.lower().replace('_', ' ')} | {counts[label]} | " + " | ".join(cells) + " |")
    return lines


def _cell(name: str, e: Estimate | None) -> str:
    if e is None:
        return "-"
    if name in TEXTS:
        return f"{100 * e.mean:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"
    return f"{e.mean:.2f} [{e.low:.2f}, {e.high:.2f}]"
