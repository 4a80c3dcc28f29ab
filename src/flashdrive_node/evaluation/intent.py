"""What a reasoning text says the vehicle will do, and whether the trajectory beside it does that.

Only the plainest claims are looked at: the first verb of the text that speaks of speed or of a turn. Texts of any model
in the reference's manner (verb first, then the cause) can be judged; one that makes no such claim is not judged.
"""

from __future__ import annotations

import re
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class Intent(Enum):
    """The claim of a text."""

    STOP = "stop"
    SLOW = "slow"
    KEEP = "keep"
    SPEED_UP = "speed up"
    TURN_LEFT = "turn left"
    TURN_RIGHT = "turn right"


_PATTERNS = {
    Intent.STOP: r"stop|stopping|halt|wait|remain stopped|stay stopped",
    Intent.SLOW: r"yield|slow|slowing|decelerate|decelerating|brake|braking|reduce speed|reduce the speed|ease off",
    Intent.KEEP: r"keep|maintain|continue|hold|follow the (?!route)|cruise",
    Intent.SPEED_UP: r"accelerate|accelerating|speed up|resume|proceed",
    Intent.TURN_LEFT: r"turn left|turning left",
    Intent.TURN_RIGHT: r"turn right|turning right",
}
_CLAIM = re.compile("|".join(rf"(?P<{i.name}>\b(?:{p})(?!\w))" for i, p in _PATTERNS.items()), re.IGNORECASE)

#: What stands behind these words is the cause, not the claim.
_CAUSE = re.compile(r"\b(?:because|since|while|due to|as)\b", re.IGNORECASE)

#: Points after t0 in which a slower speed must show, and through which a speed must be kept. A text speaks of what
#: begins within half a second; a stop or a turn may take the whole path.
_SOON, _KEPT = 30, 20
#: A changed speed, m/s; the largest change that still is the same speed; what counts as standing, m/s; a turn, radians.
_CHANGED, _SAME, _STANDING, _TURNED = 0.2, 2.5, 1.0, 0.2


def stated_intent(text: str) -> Intent | None:
    """The first claim of a text, or None where there is none."""
    found = _CLAIM.search(_CAUSE.split(text, maxsplit=1)[0])
    return Intent[found.lastgroup] if found and found.lastgroup else None


def agrees(intent: Intent, initial_speed: float, speed: NDArray[np.floating], yaw: NDArray[np.floating]) -> bool:
    """Whether a path does what its text says.

    Args:
        intent: Of `stated_intent`.
        initial_speed: At t0, m/s.
        speed: At 0.1 s, 0.2 s, ..., float [64], m/s.
        yaw: Heading at these times relative to t0, left positive, float [64], radians.
    """
    if intent is Intent.STOP:
        return bool(speed.min() < max(_STANDING, 0.7 * initial_speed))
    if intent is Intent.SLOW:
        return bool(speed[:_SOON].min() < max(_STANDING, initial_speed - _CHANGED))
    if intent is Intent.SPEED_UP:
        return bool(speed.max() > initial_speed + _CHANGED)
    if intent is Intent.KEEP:
        return bool(np.abs(speed[:_KEPT] - initial_speed).max() < _SAME)
    return bool((yaw.max() if intent is Intent.TURN_LEFT else -yaw.min()) > _TURNED)
