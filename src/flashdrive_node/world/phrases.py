"""The phrases that sentences are made of, by what they say."""

from __future__ import annotations

from flashdrive_node.world.expert import Cause
from flashdrive_node.world.reasoning import Pace, Start
from flashdrive_node.world.steering import Manoeuvre

#: What an agent is called, by `Kind`, and while the ego passes it or waits behind it.
NAMES = ("vehicle", "car", "truck", "cyclist", "pedestrian", "cone")
PASSED_NAMES = {"car": "parked car", "cone": "traffic cones"}
SIDES = ("left", "right")
#: Where a nudge leads, and whence crossing traffic comes.
LANES = ("within the lane", "out of the lane")
ONCOMING = "that is oncoming"
CROSSING = "crossing from the {side}"

#: Wordings by cause and pace; {who} is the agent, {side} where it comes from, {coming} how.
LONGITUDINAL: dict[Cause, dict[Pace, tuple[str, ...]]] = {
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

#: By manoeuvre; {lane} is one of `LANES`.
LATERAL: dict[Manoeuvre, tuple[str, ...]] = {
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

#: Where the ego may drive on.
STARTS: dict[Start, tuple[str, ...]] = {
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
WHILE = {
    Cause.RED_LIGHT: "the traffic light ahead is not green",
    Cause.STOP_SIGN: "a stop sign is ahead",
    Cause.CURVE: "the road bends ahead",
    Cause.TURN: "the turn is near",
    Cause.SPEED_BUMP: "a speed bump is ahead",
}
