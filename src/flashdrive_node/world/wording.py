"""Sentences and navigation instructions in the manner of the model: one sentence, verb first, then the cause."""

from __future__ import annotations

from itertools import product

import numpy as np

from flashdrive_node.world.draws import mix
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.reasoning import Pace, Reason, Start
from flashdrive_node.world.scene import NOWHERE_M, Scene
from flashdrive_node.world.state import State
from flashdrive_node.world.steering import Manoeuvre

_NAMES = ("vehicle", "car", "truck", "cyclist", "pedestrian", "cone")  # by `Kind`

#: Wordings by cause and pace; {who} is the agent, {side} where it comes from.
_LONGITUDINAL: dict[Cause, dict[Pace, tuple[str, ...]]] = {
    Cause.FREE: {
        Pace.KEEP: (
            "Keep lane at the set speed since the road ahead is clear",
            "Maintain speed in the lane because nothing is in the way",
            "Continue at the set speed since the lane is clear",
        ),
        Pace.SPEED_UP: (
            "Accelerate to the set speed since the lane ahead is clear",
            "Speed up because the road ahead is free",
        ),
        Pace.SLOW: ("Ease off to return to the set speed", "Reduce speed slightly to hold the set speed"),
    },
    Cause.LEAD: {
        Pace.KEEP: (
            "Keep a safe distance to the {who} ahead since it sets the pace",
            "Follow the {who} ahead at a safe distance because it is in the lane",
        ),
        Pace.SPEED_UP: (
            "Accelerate to follow the {who} ahead since it is pulling away",
            "Speed up behind the {who} ahead because the gap is opening",
        ),
        Pace.SLOW: (
            "Slow down to keep a safe distance since the {who} ahead is slower",
            "Decelerate for the slower {who} ahead to keep the gap",
        ),
        Pace.STOP: (
            "Stop behind the stopped {who} ahead",
            "Come to a stop since the {who} ahead is standing",
        ),
    },
    Cause.CUT_IN: {
        Pace.KEEP: ("Keep speed while the {who} from the {side} moves into the lane",),
        Pace.SPEED_UP: ("Accelerate gently behind the {who} that moved in from the {side}",),
        Pace.SLOW: (
            "Slow down because the {who} is cutting in from the {side}",
            "Yield to the {who} cutting in from the {side} to open a gap",
        ),
    },
    Cause.RED_LIGHT: {
        Pace.KEEP: ("Approach the stop line with care since the traffic light is not green",),
        Pace.SPEED_UP: ("Roll up to the stop line since the traffic light is not green",),
        Pace.SLOW: ("Slow down because the traffic light ahead is not green",),
        Pace.STOP: (
            "Stop at the stop line because the traffic light is red",
            "Come to a stop for the red light ahead",
        ),
    },
    Cause.STOP_SIGN: {
        Pace.KEEP: ("Approach the stop line with care since there is a stop sign",),
        Pace.SPEED_UP: ("Roll up to the stop line since there is a stop sign",),
        Pace.SLOW: ("Slow down because of the stop sign ahead",),
        Pace.STOP: ("Stop at the stop line because of the stop sign", "Come to a stop for the stop sign ahead"),
    },
    Cause.PEDESTRIAN: {
        Pace.KEEP: ("Keep a low speed since a pedestrian is crossing from the {side}",),
        Pace.SPEED_UP: ("Roll on slowly behind the pedestrian crossing from the {side}",),
        Pace.SLOW: ("Slow down because a pedestrian is crossing from the {side}",),
        Pace.STOP: (
            "Stop before the crossing because a pedestrian is crossing from the {side}",
            "Yield to the pedestrian crossing from the {side}",
        ),
    },
    Cause.CROSS_TRAFFIC: {
        Pace.KEEP: ("Approach the junction with care since a {who} has the way",),
        Pace.SPEED_UP: ("Roll up to the junction since a {who} has the way",),
        Pace.SLOW: ("Slow down to yield to the {who} {coming}",),
        Pace.STOP: ("Yield at the junction to the {who} {coming}", "Wait at the junction for the {who} {coming}"),
    },
    Cause.CURVE: {
        Pace.KEEP: ("Hold a lower speed through the curve", "Keep the speed adapted to the bend in the road"),
        Pace.SPEED_UP: ("Accelerate since the curve is opening", "Speed up because the bend is ending"),
        Pace.SLOW: ("Slow down for the curve ahead", "Reduce speed because the road bends ahead"),
    },
    Cause.TURN: {
        Pace.KEEP: ("Hold a low speed for the turn",),
        Pace.SPEED_UP: ("Accelerate since the turn is ending",),
        Pace.SLOW: ("Slow down for the turn ahead", "Reduce speed because the turn is near"),
    },
    Cause.SPEED_BUMP: {
        Pace.KEEP: ("Hold a low speed over the speed bump",),
        Pace.SPEED_UP: ("Accelerate since the speed bump is passed",),
        Pace.SLOW: ("Slow down for the speed bump ahead", "Reduce speed because of the speed bump ahead"),
    },
    Cause.BLOCKED: {
        Pace.KEEP: ("Keep behind the {who} since oncoming traffic leaves no room to pass",),
        Pace.SPEED_UP: ("Roll up behind the {who} since oncoming traffic leaves no room to pass",),
        Pace.SLOW: ("Slow down behind the {who} because oncoming traffic leaves no room to pass",),
        Pace.STOP: ("Stay behind the {who} because oncoming traffic leaves no room to pass",),
    },
    Cause.GAP: {
        Pace.KEEP: ("Keep speed to find a gap in the left lane since the lane ends",),
        Pace.SPEED_UP: ("Accelerate towards a gap in the left lane since the lane ends",),
        Pace.SLOW: ("Slow down to find a gap in the left lane since the lane ends",),
    },
    Cause.PASSING: {
        Pace.KEEP: ("Hold a low speed while passing the {who}",),
        Pace.SPEED_UP: ("Accelerate gently while passing the {who}",),
        Pace.SLOW: ("Slow down to pass the {who} with room to the side",),
    },
}

_LATERAL: dict[Manoeuvre, tuple[str, ...]] = {
    Manoeuvre.NUDGE: (
        "Nudge left {lane} to safely pass the {who} on the right",
        "Move left {lane} to give room to the {who} on the right",
    ),
    Manoeuvre.LANE_CHANGE: (
        "Change to the left lane to pass the slower {who} ahead",
        "Move into the left lane because the {who} ahead is slow",
    ),
    Manoeuvre.MERGE: ("Merge into the left lane because the lane ends", "Move left since the lane ends ahead"),
    Manoeuvre.TURN_LEFT: ("Turn left at the junction as navigated", "Follow the route, turning left at the junction"),
    Manoeuvre.TURN_RIGHT: (
        "Turn right at the junction as navigated",
        "Follow the route, turning right at the junction",
    ),
}

_STARTS: dict[Start, tuple[str, ...]] = {
    Start.GREEN_LIGHT: (
        "Accelerate since the traffic light has turned green",
        "Proceed through the junction because the light is green",
    ),
    Start.STOP_DONE: (
        "Proceed through the junction since the stop is done and the way is clear",
        "Accelerate from the stop line because the junction is clear",
    ),
}

#: Second clauses, behind any sentence.
_WHILE = {
    Cause.RED_LIGHT: "the traffic light ahead is not green",
    Cause.STOP_SIGN: "a stop sign is ahead",
    Cause.CURVE: "the road bends ahead",
    Cause.TURN: "the turn is near",
    Cause.SPEED_BUMP: "a speed bump is ahead",
}
#: Causes so pressing that they are named instead of a manoeuvre, when the ego brakes or waits for them.
_PRESSING = {Cause.LEAD, Cause.CUT_IN, Cause.RED_LIGHT, Cause.STOP_SIGN, Cause.PEDESTRIAN, Cause.CROSS_TRAFFIC}


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
    cause, pace, manoeuvre = Cause(r["cause"]), Pace(r["pace"]), Manoeuvre(r["manoeuvre"])
    pressing = cause in _PRESSING and pace in (Pace.SLOW, Pace.STOP)
    # A vehicle that the ego is about to pass is why it changes lanes.
    pressing = pressing and not (cause == Cause.LEAD and manoeuvre == Manoeuvre.LANE_CHANGE)
    actor, second = r["actor"], Cause(r["second"])
    if r["start"] != Start.NONE and manoeuvre == Manoeuvre.KEEP:
        forms = _STARTS[Start(r["start"])]
    elif manoeuvre != Manoeuvre.KEEP and not pressing and cause != Cause.BLOCKED:
        # The reason for the speed becomes the second clause; that a turn is slow goes without saying.
        forms, actor, second = _LATERAL[manoeuvre], r["lateral_actor"], cause
        cause = Cause.TURN if manoeuvre in (Manoeuvre.TURN_LEFT, Manoeuvre.TURN_RIGHT) else Cause.FREE
    else:
        forms = _LONGITUDINAL[cause].get(pace) or _LONGITUDINAL[cause][Pace.SLOW]
    who = _NAMES[kinds[actor]] if actor >= 0 else "vehicle"
    if manoeuvre == Manoeuvre.NUDGE or cause in (Cause.BLOCKED, Cause.PASSING):
        who = {"car": "parked car", "cone": "traffic cones"}.get(who, who)
    side = "left" if r["from_left"] else "right"
    coming = "that is oncoming" if actor >= 0 and directions[actor] < 0 else f"crossing from the {side}"
    lane = "out of the lane" if r["out_of_lane"] else "within the lane"
    text = forms[choice % len(forms)].format(who=who, side=side, lane=lane, coming=coming)
    return f"{text}, while {_WHILE[second]}." if second != cause and second in _WHILE else f"{text}."


def every_sentence() -> list[str]:
    """Every sentence that the wording can make, sorted; some of them no scene leads to."""
    by_pace = [forms for paces in _LONGITUDINAL.values() for forms in paces.values()]
    templates = [form for forms in (*by_pace, *_LATERAL.values(), *_STARTS.values()) for form in forms]
    names, sides, lanes = (*_NAMES, "parked car", "traffic cones"), ("left", "right"), ("out of", "within")
    texts = {
        form.format(who=who, side=side, lane=f"{lane} the lane", coming=coming)
        for form, who, side, lane in product(templates, names, sides, lanes)
        for coming in ("that is oncoming", f"crossing from the {side}")
    }
    return sorted(f"{text}{end}." for text in texts for end in ("", *(f", while {also}" for also in _WHILE.values())))


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
