"""What texts claim, and which paths fulfil it."""

import numpy as np
import pytest

from flashdrive_node.evaluation.intent import Intent, agrees, stated_intent


@pytest.mark.parametrize(
    ("text", "intent"),
    [
        ("Stop at the stop line because the traffic light is red.", Intent.STOP),
        ("Keep distance to the lead vehicle since it is slowing.", Intent.KEEP),
        ("Slow down because of the stop sign ahead.", Intent.SLOW),
        ("Proceed through the junction since the stop is done and the way is clear.", Intent.SPEED_UP),
        ("Follow the route, turning left at the junction.", Intent.TURN_LEFT),
        ("Turn right at the junction as navigated, while a stop sign is ahead.", Intent.TURN_RIGHT),
        ("Move into the left lane because the truck ahead is slow.", None),
        ("Yield to the car cutting in from the left to open a gap.", Intent.SLOW),
        ("", None),
        ("Keepsake brakes.", None),
    ],
)
def test_the_first_claim_counts(text: str, intent: Intent | None) -> None:
    assert stated_intent(text) is intent


@pytest.mark.parametrize(
    ("acceleration", "curvature", "kept"),
    [
        (0.0, 0.0, {Intent.KEEP}),
        (-1.5, 0.0, {Intent.STOP, Intent.SLOW}),
        (1.5, 0.0, {Intent.SPEED_UP}),
        (0.0, 0.02, {Intent.KEEP, Intent.TURN_LEFT}),
        (0.0, -0.02, {Intent.KEEP, Intent.TURN_RIGHT}),
    ],
)
def test_paths_that_fulfil_a_claim(acceleration: float, curvature: float, kept: set[Intent]) -> None:
    times = 0.1 * np.arange(1, 65)
    speed = np.maximum(8.0 + acceleration * times, 0.0)
    yaw = np.cumsum(speed) * 0.1 * curvature
    assert {intent for intent in Intent if agrees(intent, 8.0, speed, yaw)} == kept
