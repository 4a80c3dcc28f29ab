"""The decision that a sentence states: what the wording puts into words, and read back from a text."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from flashdrive_node.world.expert import Cause
from flashdrive_node.world.phrases import (
    CROSSING,
    LANES,
    LATERAL,
    LONGITUDINAL,
    NAMES,
    ONCOMING,
    PASSED_NAMES,
    SIDES,
    STARTS,
    WHILE,
)
from flashdrive_node.world.reasoning import Pace, Start
from flashdrive_node.world.steering import Manoeuvre

#: Causes so pressing that they are named instead of a manoeuvre, when the ego brakes or waits for them.
_PRESSING = {Cause.LEAD, Cause.CUT_IN, Cause.RED_LIGHT, Cause.STOP_SIGN, Cause.PEDESTRIAN, Cause.CROSS_TRAFFIC}
_TURNS = (Manoeuvre.TURN_LEFT, Manoeuvre.TURN_RIGHT)


class StatedDecision(NamedTuple):
    """What a sentence says is done, and why. Paraphrases state the same decision."""

    #: Why the speed is what it is; a sentence about a manoeuvre says nothing of it, there it is FREE, or TURN in turns.
    cause: Cause
    #: KEEP in sentences about a manoeuvre.
    pace: Pace
    manoeuvre: Manoeuvre
    #: What allows the ego to drive on.
    start: Start

    @property
    def label(self) -> str:
        """Its class: the manoeuvre, or what allows to drive on, or the cause; as in the decision list of Alpamayo."""
        if self.manoeuvre != Manoeuvre.KEEP:
            return self.manoeuvre.name
        return self.cause.name if self.start == Start.NONE else self.start.name


def decision_of(cause: Cause, pace: Pace, manoeuvre: Manoeuvre, start: Start) -> StatedDecision:
    """The decision that a sentence states, of all that goes on at once.

    Args:
        cause: Of the speed.
        pace: What happens to the speed.
        manoeuvre: What happens sideways.
        start: What allows the ego to drive on.
    """
    pressing = cause in _PRESSING and pace in (Pace.SLOW, Pace.STOP)
    # A vehicle that the ego is about to pass is why it changes lanes.
    pressing = pressing and not (cause == Cause.LEAD and manoeuvre == Manoeuvre.LANE_CHANGE)
    if manoeuvre == Manoeuvre.KEEP and start != Start.NONE:
        return StatedDecision(Cause.FREE, Pace.SPEED_UP, manoeuvre, start)
    if manoeuvre != Manoeuvre.KEEP and not pressing and cause != Cause.BLOCKED:
        # That a turn is slow goes without saying.
        return StatedDecision(Cause.TURN if manoeuvre in _TURNS else Cause.FREE, Pace.KEEP, manoeuvre, Start.NONE)
    # Nobody comes to a standstill for a bend: the nearest that there are words for.
    said = pace if pace in LONGITUDINAL[cause] else Pace.SLOW
    return StatedDecision(cause, said, Manoeuvre.KEEP, Start.NONE)


def every_decision() -> list[StatedDecision]:
    """Every decision that there are words for."""
    speeds = [StatedDecision(c, p, Manoeuvre.KEEP, Start.NONE) for c, paces in LONGITUDINAL.items() for p in paces]
    sideways = [decision_of(Cause.FREE, Pace.KEEP, manoeuvre, Start.NONE) for manoeuvre in LATERAL]
    starts = [decision_of(Cause.FREE, Pace.SPEED_UP, Manoeuvre.KEEP, start) for start in STARTS]
    return [*speeds, *sideways, *starts]


def forms_of(decision: StatedDecision) -> tuple[str, ...]:
    """The paraphrases of a decision, with places for `who`, `side`, `lane` and `coming`."""
    if decision.manoeuvre != Manoeuvre.KEEP:
        return LATERAL[decision.manoeuvre]
    if decision.start != Start.NONE:
        return STARTS[decision.start]
    return LONGITUDINAL[decision.cause][decision.pace]


def parse(sentence: str) -> StatedDecision | None:
    """The decision that a sentence states, or None where the wording could not have made it.

    Args:
        sentence: Untrusted text; space around it does not matter.
    """
    text = sentence.strip()
    return next((decision for pattern, decision in _patterns() if pattern.fullmatch(text)), None)


@cache
def _patterns() -> list[tuple[re.Pattern[str], StatedDecision]]:
    def one_of(texts: tuple[str, ...]) -> str:
        return "(?:" + "|".join(re.escape(text) for text in texts) + ")"

    crossing = tuple(CROSSING.format(side=side) for side in SIDES)
    places = {
        "who": one_of((*NAMES, *PASSED_NAMES.values())),
        "side": one_of(SIDES),
        "lane": one_of(LANES),
        "coming": one_of((ONCOMING, *crossing)),
    }
    end = f"(?:, while {one_of(tuple(WHILE.values()))})?\\."
    found = []
    for decision in every_decision():
        for form in forms_of(decision):
            # The places are all that is not literal.
            pattern = re.sub(r"\\\{(\w+)\\\}", lambda place: places[place[1]], re.escape(form))
            found.append((re.compile(pattern + end), decision))
    return found
