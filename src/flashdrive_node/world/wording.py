"""Sentences and navigation instructions in the manner of the model: one sentence, verb first, then the cause."""

from __future__ import annotations

from itertools import product

import numpy as np

from flashdrive_node.world.decision_text import decision_of, every_decision, forms_of
from flashdrive_node.world.draws import mix
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.phrases import CROSSING, LANES, NAMES, ONCOMING, PASSED_NAMES, SIDES, WHILE
from flashdrive_node.world.reasoning import Pace, Reason, Start
from flashdrive_node.world.scene import NOWHERE_M, Scene
from flashdrive_node.world.state import State
from flashdrive_node.world.steering import Manoeuvre


def sentences(scene: Scene, state: State, reason: Reason) -> list[str]:
    """One sentence per scene. The wording is chosen by the scene's key and the second of the drive."""
    table = {name: value.tolist() for name, value in reason._asdict().items()}
    kinds, directions = scene.agents.kind.tolist(), scene.agents.direction.tolist()
    second = state.time_s.cpu().floor().long()
    choices = mix((scene.key.cpu() * 1009 + second).numpy().astype(np.uint64)).tolist()
    return [
        _sentence({name: column[i] for name, column in table.items()}, kinds[i], directions[i], choices[i])
        for i in range(len(kinds))
    ]


def _sentence(r: dict[str, int], kinds: list[int], directions: list[int], choice: int) -> str:
    cause, second, actor = Cause(r["cause"]), Cause(r["second"]), r["actor"]
    decision = decision_of(cause, Pace(r["pace"]), Manoeuvre(r["manoeuvre"]), Start(r["start"]))
    if decision.manoeuvre != Manoeuvre.KEEP:
        # The reason for the speed becomes the second clause.
        second, actor = cause, r["lateral_actor"]
    who = NAMES[kinds[actor]] if actor >= 0 else "vehicle"
    if r["manoeuvre"] == Manoeuvre.NUDGE or decision.cause in (Cause.BLOCKED, Cause.PASSING):
        who = PASSED_NAMES.get(who, who)
    side = SIDES[0 if r["from_left"] else 1]
    coming = ONCOMING if actor >= 0 and directions[actor] < 0 else CROSSING.format(side=side)
    forms = forms_of(decision)
    text = forms[choice % len(forms)].format(who=who, side=side, lane=LANES[r["out_of_lane"]], coming=coming)
    return f"{text}, while {WHILE[second]}." if second != decision.cause and second in WHILE else f"{text}."


def every_sentence() -> list[str]:
    """Every sentence that the wording can make, sorted; some of them no scene leads to."""
    templates = [form for decision in every_decision() for form in forms_of(decision)]
    texts = {
        form.format(who=who, side=side, lane=lane, coming=coming)
        for form, who, side, lane in product(templates, (*NAMES, *PASSED_NAMES.values()), SIDES, LANES)
        for coming in (ONCOMING, CROSSING.format(side=side))
    }
    return sorted(f"{text}{end}." for text in texts for end in ("", *(f", while {also}" for also in WHILE.values())))


def navigation(scene: Scene, state: State) -> list[str | None]:
    """Navigation instruction per scene, as the model takes it, or None."""
    turns = scene.turn.tolist()
    texts: list[str | None] = []
    ahead = (scene.turn_s - state.s).tolist()
    straight = scene.junction_s - state.s
    for turn, to_turn, to_junction in zip(turns, ahead, straight.tolist(), strict=True):
        if turn and -1.0 < to_turn < 120.0:
            word = "left" if turn > 0 else "right"
            texts.append(f"Turn {word} in {round(to_turn)}m" if to_turn > 5.0 else f"Turn {word}")
        elif not turn and to_junction < 0.5 * NOWHERE_M and 0.0 < to_junction < 60.0:
            texts.append("Continue straight")
        else:
            texts.append(None)
    return texts


def every_instruction() -> list[str]:
    """Every navigation instruction that a scene can lead to."""
    turns = [f"Turn {word}" for word in ("left", "right")]
    return ["Continue straight", *turns, *(f"{turn} in {m}m" for turn in turns for m in range(5, 121))]
