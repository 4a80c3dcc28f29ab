"""How the expert fares over many scenes, and whether every scenario shows what it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from flashdrive_node.world.draws import Keys, scene_keys
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.faults import Faults, faults, no_faults
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, Scenario, Scene, move
from flashdrive_node.world.simulation import advance
from flashdrive_node.world.state import first_state
from flashdrive_node.world.steering import Manoeuvre

#: The causes and manoeuvres that a scenario exists for; any of them makes it a scene of its kind.
SUBJECT: Mapping[Scenario, tuple[Cause | Manoeuvre, ...]] = {
    Scenario.CRUISE: (Cause.FREE,),
    Scenario.SLOW_LEAD: (Cause.LEAD,),
    Scenario.BRAKING_LEAD: (Cause.LEAD,),
    Scenario.STOP_AND_GO: (Cause.LEAD,),
    Scenario.RED_LIGHT: (Cause.RED_LIGHT,),
    Scenario.GREEN_LIGHT: (Cause.RED_LIGHT,),
    Scenario.STOP_SIGN: (Cause.STOP_SIGN,),
    Scenario.PEDESTRIAN: (Cause.PEDESTRIAN,),
    Scenario.CUT_IN: (Cause.CUT_IN,),
    Scenario.PARKED_CAR: (Cause.BLOCKED, Manoeuvre.NUDGE),
    Scenario.LANE_CHANGE: (Manoeuvre.LANE_CHANGE,),
    Scenario.CURVE: (Cause.CURVE,),
    Scenario.TURN_LEFT: (Manoeuvre.TURN_LEFT,),
    Scenario.TURN_RIGHT: (Manoeuvre.TURN_RIGHT,),
    Scenario.MERGE: (Manoeuvre.MERGE,),
    Scenario.CONES: (Cause.BLOCKED, Manoeuvre.NUDGE),
    Scenario.CYCLIST: (Cause.BLOCKED, Manoeuvre.NUDGE),
    Scenario.CROSS_TRAFFIC: (Cause.CROSS_TRAFFIC,),
    Scenario.SPEED_BUMP: (Cause.SPEED_BUMP,),
}


@dataclass
class Survey:
    """Counts over scenes that the expert drove."""

    scenes: int = 0
    #: Scenes with each fault.
    faults: dict[str, int] = field(default_factory=dict)
    #: Scenes, and those that showed their subject, by scenario.
    by_scenario: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: Seconds under every cause and in every manoeuvre.
    cause_s: dict[str, float] = field(default_factory=dict)
    manoeuvre_s: dict[str, float] = field(default_factory=dict)
    #: Mean distance per scene, metres.
    distance_m: float = 0.0

    def rows(self) -> list[str]:
        """As a table."""
        lines = [
            f"{self.scenes} scenes, {self.distance_m:.0f} m each on average",
            "",
            "fault            scenes       %",
        ]
        lines += [f"{name:<16} {n:>6} {100 * n / max(self.scenes, 1):>7.3f}" for name, n in self.faults.items()]
        for title, seconds in (("cause", self.cause_s), ("manoeuvre", self.manoeuvre_s)):
            whole = sum(seconds.values()) or 1.0
            lines += ["", f"{title:<16} share of time %"]
            lines += [f"{name:<16} {100 * s / whole:>6.1f}" for name, s in seconds.items()]
        lines += ["", "scenario         scenes  showing their subject %"]
        lines += [f"{name:<16} {n:>6} {100 * k / max(n, 1):>7.1f}" for name, (n, k) in self.by_scenario.items()]
        return lines


def expert_run(scene: Scene, steps: int) -> tuple[Faults, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Let the expert drive.

    Returns:
        Faults [S]; seconds under every cause [S, causes] and in every manoeuvre [S, manoeuvres]; distance [S], metres.
    """
    state, wrong = first_state(scene), no_faults(scene)
    causes = torch.zeros(len(scene), len(Cause), dtype=torch.float64, device=scene.device)
    manoeuvres = torch.zeros(len(scene), len(Manoeuvre), dtype=torch.float64, device=scene.device)
    for _ in range(steps):
        after, decision = advance(scene, state)
        happened = faults(scene, state, after)
        wrong = Faults(*(a | b for a, b in zip(wrong, happened, strict=True)))
        one = torch.full_like(causes[:, :1], DT_S)
        causes.scatter_add_(1, decision.cause[:, None], one)
        manoeuvres.scatter_add_(1, decision.manoeuvre[:, None], one)
        state = after
    return wrong, causes, manoeuvres, state.s


def sound_keys(keys: Keys, steps: int, device: torch.device | str = "cpu") -> Keys:
    """Those scenes that the expert drives without any fault: what a data set is made of."""
    wrong = expert_run(move(sample_scenes(keys), device), steps)[0]
    return keys[~wrong.any.cpu().numpy()]


def survey(
    split: str,
    count: int,
    steps: int,
    *,
    device: torch.device | str = "cpu",
    batch: int = 1000,
    filtered: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Drive `count` scenes of a split and count.

    Args:
        split: "train", "validation" or "test".
        count: Scenes, from index 0 on.
        steps: Of DT_S per scene.
        device: Where to.
        batch: Scenes at a time.
        filtered: Only scenes that the expert drove without fault for 8 s more than `steps`, as a data set has them.
        progress: Called with the number of scenes done.
    """
    result = Survey(
        faults=dict.fromkeys(Faults._fields, 0),
        by_scenario={s.name: (0, 0) for s in Scenario},
        cause_s={c.name: 0.0 for c in Cause},
        manoeuvre_s={m.name: 0.0 for m in Manoeuvre},
    )
    distance = 0.0
    for first in range(0, count, batch):
        keys = scene_keys(split, np.arange(first, min(first + batch, count)))
        if filtered:
            keys = sound_keys(keys, steps + 80, device)
        scene = move(sample_scenes(keys), device)
        wrong, causes, manoeuvres, along = expert_run(scene, steps)
        for name in Faults._fields:
            result.faults[name] += int(getattr(wrong, name).sum())
        for scenario, subject in SUBJECT.items():
            rows = scene.scenario == int(scenario)
            shown = torch.zeros_like(rows)
            for one in subject:
                times = causes if isinstance(one, Cause) else manoeuvres
                shown = shown | (times[:, int(one)] > 0.45)
            n, k = result.by_scenario[scenario.name]
            result.by_scenario[scenario.name] = (n + int(rows.sum()), k + int((rows & shown).sum()))
        for cause in Cause:
            result.cause_s[cause.name] += float(causes[:, int(cause)].sum())
        for manoeuvre in Manoeuvre:
            result.manoeuvre_s[manoeuvre.name] += float(manoeuvres[:, int(manoeuvre)].sum())
        distance += float(along.sum())
        result.scenes += len(keys)
        if progress is not None:
            progress(min(first + batch, count))
    result.distance_m = distance / max(result.scenes, 1)
    return result
