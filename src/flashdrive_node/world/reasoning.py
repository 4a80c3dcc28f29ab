"""Why the ego does what it does next: causes from the expert's decisions, checked against what could be seen."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.expert import Cause, Decision
from flashdrive_node.world.scene import Control, Light, Scene
from flashdrive_node.world.sight import Sight, evident, recent
from flashdrive_node.world.state import State
from flashdrive_node.world.steering import OUT_OF_LANE_M, Manoeuvre

#: A window is labelled with the decision of half a second later, so that a text comes before the onset.
ONSET_STEPS = 5


class Pace(IntEnum):
    """What happens to the speed."""

    KEEP = 0
    SPEED_UP = 1
    SLOW = 2
    STOP = 3


class Start(IntEnum):
    """What allows the ego to drive on."""

    NONE = 0
    GREEN_LIGHT = 1
    STOP_DONE = 2


class Reason(NamedTuple):
    """What a sentence says: [S] each, integers."""

    #: `Cause` and the agent that it is about, or -1.
    cause: Tensor
    actor: Tensor
    #: The second cause, or the same again.
    second: Tensor
    #: `Pace`, `Manoeuvre`, the agent of the manoeuvre or -1, `Start`.
    pace: Tensor
    manoeuvre: Tensor
    lateral_actor: Tensor
    start: Tensor
    #: The nudge leads out of the lane: 1 or 0.
    out_of_lane: Tensor
    #: The agent of the cause stands: 1 or 0; it comes from the left: 1 or 0.
    standing: Tensor
    from_left: Tensor


#: Causes that end in a standstill.
_STOPPING = (Cause.RED_LIGHT, Cause.STOP_SIGN, Cause.PEDESTRIAN, Cause.CROSS_TRAFFIC, Cause.BLOCKED)


def reason(scene: Scene, state: State, sights: Sequence[Sight], now: Decision, onset: Decision) -> Reason:
    """The reason to be given at a moment.

    Args:
        scene, state: S scenes at this moment.
        sights: What was seen up to and including this moment, oldest first.
        now: The expert's decision of this moment.
        onset: Its decision `ONSET_STEPS` later.
    """
    seen = recent(sights)
    later = evident(seen, onset.cause, onset.actor)
    cause, actor = torch.where(later, onset.cause, now.cause), torch.where(later, onset.actor, now.actor)
    second, accel = torch.where(later, onset.second, now.second), torch.where(later, onset.accel, now.accel)
    # The expert knows more than the cameras: what they have not shown is no reason.
    known = evident(seen, cause, actor)
    cause = torch.where(known, cause, int(Cause.FREE))
    actor = torch.where(known, actor, -1)
    # The second cause has no agent of its own: only what stands still at the road may be named.
    placed = torch.zeros_like(known)
    for place in (Cause.CURVE, Cause.TURN, Cause.SPEED_BUMP, Cause.RED_LIGHT, Cause.STOP_SIGN):
        placed = placed | (second == int(place))
    second = torch.where(placed & evident(seen, second, torch.full_like(actor, -1)), second, cause)

    sideways = torch.where(later, onset.manoeuvre, now.manoeuvre)
    lateral = torch.where(later, onset.lateral_actor, now.lateral_actor)
    unseen = (lateral >= 0) & ~seen.agents.gather(1, lateral.clamp(min=0)[:, None])[:, 0]
    sideways = torch.where(unseen, int(Manoeuvre.KEEP), sideways)

    slow = torch.where(accel < -0.35, int(Pace.SLOW), int(Pace.KEEP))
    pace = torch.where(accel > 0.35, int(Pace.SPEED_UP), slow)
    stops = torch.zeros_like(known)
    for one in _STOPPING:
        stops = stops | (cause == int(one))
    who = actor.clamp(min=0)[:, None]
    standing = (actor >= 0) & (state.agent_speed.gather(1, who)[:, 0] < 0.6)
    stops = stops | ((cause == int(Cause.LEAD)) & standing)
    halting = (accel < -0.35) | (state.speed < 1.0)
    pace = torch.where(stops & halting & (accel < 0.35), int(Pace.STOP), pace)

    red, green = scene.light_times[:, 1], scene.light_times[:, 2]
    since = state.time_s + ONSET_STEPS * 0.1 - green
    near = (scene.stop_line_s - state.front_s).abs() < 40.0
    go = (since > 0) & (since < 4.0) & (red < green) & near & (scene.light(state.time_s + 0.5) == int(Light.GREEN))
    go = go & seen.light & (pace == int(Pace.SPEED_UP))
    done = (scene.control == int(Control.STOP_SIGN)) & state.stopped & near & (pace == int(Pace.SPEED_UP))
    done = done & (state.front_s < scene.stop_line_s + 8.0)
    start = torch.where(go, int(Start.GREEN_LIGHT), torch.where(done, int(Start.STOP_DONE), int(Start.NONE)))
    start = torch.where(cause == int(Cause.FREE), start, int(Start.NONE))
    offset = onset.aim_d + onset.aim_rate
    rate = state.agent_rate.gather(1, who)[:, 0]
    side = state.agent_d.gather(1, who)[:, 0] - state.d
    moving = rate.abs() > 0.1
    from_left = torch.where(moving, rate < 0, side > 0) & (actor >= 0)
    return Reason(
        cause,
        actor,
        second,
        pace,
        sideways,
        torch.where(unseen, -1, lateral),
        start,
        (offset > OUT_OF_LANE_M).long(),
        standing.long(),
        from_left.long(),
    )
