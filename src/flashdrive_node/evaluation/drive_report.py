"""Tables of closed-loop runs: every policy on the same scenes, all of them and by scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flashdrive_node.evaluation.closed_loop_run import RunSettings, SceneRow
from flashdrive_node.evaluation.metrics import Estimate, bootstrap_mean
from flashdrive_node.evaluation.scores import ACCEL_RANGE, JERK_MAX, LATERAL_ACCEL_MAX

#: Figures of a row, and what they are called.
FIGURES: Mapping[str, str] = {
    "scene_score": "scene score",
    "progress": "progress",
    "at_fault_collision": "at-fault collision",
    "front_collision": "front collision",
    "other_collision": "other collision",
    "pedestrian": "pedestrian",
    "off_road": "off-road",
    "red_light": "red light",
    "stop_sign": "stop line",
    "comfort": "comfort",
    "following": "with a trajectory",
}
#: Figures of the table by scenario.
_BY_SCENARIO = ("scene_score", "progress", "at_fault_collision", "off_road", "red_light", "stop_sign")


class DriveReport(NamedTuple):
    """Closed-loop runs of several policies on the same scenes."""

    settings: RunSettings
    #: By policy.
    rows: Mapping[str, Sequence[SceneRow]]
    #: What was measured with what.
    conditions: Mapping[str, Any]

    def overall(self, policy: str) -> dict[str, Estimate]:
        """Every figure over all scenes of a policy."""
        return {name: bootstrap_mean([row.figure(name) for row in self.rows[policy]]) for name in FIGURES}

    def by_scenario(self, policy: str) -> dict[str, dict[str, Estimate]]:
        """Every figure by scenario, in order of their names."""
        groups: dict[str, list[SceneRow]] = {}
        for row in sorted(self.rows[policy], key=lambda row: row.scenario):
            groups.setdefault(row.scenario, []).append(row)
        return {
            scenario: {name: bootstrap_mean([row.figure(name) for row in rows]) for name in FIGURES}
            for scenario, rows in groups.items()
        }

    def malformed(self, policy: str) -> float | None:
        """Share of the texts that the wording could not have made; None without texts."""
        texts = sum(row.texts for row in self.rows[policy])
        return sum(row.malformed for row in self.rows[policy]) / texts if texts else None


def as_json(report: DriveReport) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "conditions": dict(report.conditions),
        "settings": vars(report.settings),
        "policies": {
            policy: {
                "overall": {name: e._asdict() for name, e in report.overall(policy).items()},
                "by_scenario": {
                    scenario: {name: e._asdict() for name, e in figures.items()}
                    for scenario, figures in report.by_scenario(policy).items()
                },
                "malformed_texts": report.malformed(policy),
                "scenes": [vars(row) for row in rows],
            }
            for policy, rows in report.rows.items()
        },
    }


def markdown(report: DriveReport) -> str:
    """Two tables and what one must know to read them."""
    policies = list(report.rows)
    s, scenes = report.settings, len(next(iter(report.rows.values())))
    lines = [
        f"Closed loop: {scenes} scenes of the {s.split} split, {s.seconds:g} s each behind 1.5 s by the expert, a plan "
        f"every {s.replan} step(s) of 0.1 s. Shares in %, mean over scenes [95 % bootstrap interval].",
        "",
        "| | " + " | ".join(policies) + " |",
        "|---|" + "---|" * len(policies),
    ]
    overall = {policy: report.overall(policy) for policy in policies}
    for name, title in FIGURES.items():
        lines.append(f"| {title} | " + " | ".join(_percent(overall[policy][name]) for policy in policies) + " |")
    texts = {policy: report.malformed(policy) for policy in policies}
    if any(share is not None for share in texts.values()):
        cells = ["-" if share is None else f"{100 * share:.2f}" for share in texts.values()]
        lines.append("| malformed texts | " + " | ".join(cells) + " |")
    lines += ["", *_scenario_table(report, policies[0]), "", _explanation()]
    return "\n".join(lines)


def _scenario_table(report: DriveReport, policy: str) -> list[str]:
    titles = [FIGURES[name] for name in _BY_SCENARIO]
    lines = [f"| {policy} | scenes | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(titles)]
    for scenario, figures in report.by_scenario(policy).items():
        cells = [f"{100 * figures[name].mean:.1f}" for name in _BY_SCENARIO]
        count = figures["scene_score"].clips
        lines.append(f"| {scenario.lower().replace('_', ' ')} | {count} | " + " | ".join(cells) + " |")
    return lines


def _percent(e: Estimate) -> str:
    return f"{100 * e.mean:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def _explanation() -> str:
    low, high = ACCEL_RANGE
    return (
        "Scene score: 0 after an at-fault collision or off the road, else progress relative to the expert on the same "
        "scene, at most 1 (AlpaSim's rule). At fault: front, pedestrian, or side while leaving the lane; only the "
        f"first collision of a scene counts. Comfort: share of time with {low:g} to {high:g} m/s² along, "
        f"{LATERAL_ACCEL_MAX:g} m/s² across and {JERK_MAX:g} m/s³ at most (nuPlan's bounds; jerk over 0.5 s)."
    )
