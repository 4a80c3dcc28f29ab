"""The expert driver: every reason to slow down gives an acceleration, the smallest one is driven and is the cause."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.scene import (
    DT_S,
    EGO_REAR_M,
    EGO_WIDTH_M,
    Control,
    Kind,
    Scene,
)
from flashdrive_node.world.state import State, feasible
from flashdrive_node.world.steering import Aim, aim, move_aim, pursue
from flashdrive_node.world.traffic import NO_REASON, follow, free_road, halt, must_stop

#: How far the expert looks ahead for things that stand in its way, metres.
_SIGHT_M = 80.0
#: Change of acceleration per second, m/s^3: harder brakes come faster than relief.
_BRAKE_JERK, _RELIEF_JERK = 12.0, 5.0


class Cause(IntEnum):
    """Why the expert drives at the speed that it does."""

    FREE = 0
    LEAD = 1
    CUT_IN = 2
    RED_LIGHT = 3
    STOP_SIGN = 4
    PEDESTRIAN = 5
    CROSS_TRAFFIC = 6
    CURVE = 7
    TURN = 8
    SPEED_BUMP = 9
    BLOCKED = 10
    GAP = 11
    PASSING = 12


class Decision(NamedTuple):
    """What the expert does now, and why: [S] each."""

    accel: Tensor
    curvature: Tensor
    cause: Tensor
    #: The runner-up among the causes, or the same as `cause` where nothing else matters.
    second: Tensor
    #: Index of the agent that the cause is about, or -1.
    actor: Tensor
    manoeuvre: Tensor
    #: Index of the agent that the manoeuvre is about, or -1.
    lateral_actor: Tensor
    #: Next `aim_d`, `aim_rate` and `changing` of the state.
    aim_d: Tensor
    aim_rate: Tensor
    changing: Tensor


class _Reason(NamedTuple):
    accel: Tensor
    actor: Tensor


def decide(scene: Scene, state: State) -> Decision:
    """The expert's action in this moment."""
    lateral = aim(scene, state)
    reasons = _reasons(scene, state, lateral)
    accels = torch.stack([reasons[cause].accel for cause in Cause], dim=1)
    actors = torch.stack([reasons[cause].actor for cause in Cause], dim=1)
    wish, cause = accels.min(dim=1)
    # Reasons that hardly differ from a free road are no reasons.
    cause = torch.where(wish > accels[:, 0] - 0.05, int(Cause.FREE), cause)
    rest = accels.scatter(1, cause[:, None], NO_REASON)
    runner, second = rest.min(dim=1)
    second = torch.where((runner < accels[:, 0] - 0.05) & (second != int(Cause.FREE)), second, cause)
    step = (wish - state.accel).clamp(-_BRAKE_JERK * DT_S, _RELIEF_JERK * DT_S)
    accel = torch.where(wish < -4.0, wish, state.accel + step)
    aim_d, aim_rate = move_aim(state, lateral.goal_d)
    accel, curvature = feasible(accel, pursue(scene, state, aim_d, aim_rate), state.speed)
    actor = actors.gather(1, cause[:, None])[:, 0]
    return Decision(
        accel, curvature, cause, second, actor, lateral.manoeuvre, lateral.actor, aim_d, aim_rate, lateral.changing
    )


def _reasons(scene: Scene, state: State, lateral: Aim) -> dict[Cause, _Reason]:
    agents, speed = scene.agents, state.speed
    nobody = torch.full_like(scene.turn, -1)
    none = torch.full_like(speed, NO_REASON)
    reasons = {cause: _Reason(none, nobody) for cause in Cause}

    def place(where: Tensor, accel: Tensor) -> _Reason:
        return _Reason(torch.where(where, accel, none), nobody)

    def people(where: Tensor, accel: Tensor) -> _Reason:
        worst, actor = torch.where(where, accel, torch.full_like(accel, NO_REASON)).min(dim=1)
        return _Reason(worst, torch.where(worst < NO_REASON, actor, nobody))

    reasons[Cause.FREE] = place(torch.ones_like(state.changing), free_road(speed, scene.speed_limit))

    # Vehicles ahead, in the lane that the ego is in or moves to, or moving into it.
    rear = state.agent_s - 0.5 * agents.length - state.front_s[:, None]
    ahead = (state.agent_s > state.s[:, None] + 1.4) & (rear < _SIGHT_M) & (agents.kind != int(Kind.NOTHING))
    solid = ahead & (agents.direction >= 0) & (agents.kind != int(Kind.PEDESTRIAN)) & (agents.lateral_speed < 3.0)
    reach = 0.5 * (agents.width + EGO_WIDTH_M) + 0.25
    goal = torch.where(lateral.changing, scene.change_d, torch.zeros_like(speed))
    in_way = (state.agent_d - state.d[:, None]).abs() < reach
    in_way = in_way | (((state.agent_d - goal[:, None]).abs() < reach) & ~agents.nudge)
    soon = (state.agent_d + 1.2 * state.agent_rate - state.d[:, None]).abs() < reach
    cutting = (state.agent_rate.abs() > 0.15) & (soon | in_way) & (agents.lateral_speed > 0)
    # What the ego passes with room is its own reason, unless it has come too close for that.
    passed = agents.nudge & ((rear > 6.0) | ~in_way)
    pull = follow(rear, speed[:, None].expand_as(rear), speed[:, None] - state.agent_speed)
    reasons[Cause.LEAD] = people(solid & in_way & ~cutting & ~passed, pull)
    reasons[Cause.CUT_IN] = people(solid & cutting & ~passed, pull)
    reasons[Cause.BLOCKED] = people(
        lateral.blocked_gap < _SIGHT_M, halt(lateral.blocked_gap.clamp(max=1e4) - 6.0, speed[:, None].expand_as(rear))
    )
    pace = torch.where(agents.kind == int(Kind.CYCLIST), 7.5, 6.5)
    slow = ((pace - speed[:, None]) / 1.2).clamp(-2.0, 2.0)
    near = torch.arange(rear.shape[1], device=rear.device)[None] == lateral.actor[:, None]
    reasons[Cause.PASSING] = people(near & lateral.passing[:, None] & (rear < 25.0), slow)

    line = scene.stop_line_s - state.front_s
    stop = halt(line, speed)
    lit = (scene.control == int(Control.LIGHT)) & (line < _SIGHT_M)
    reasons[Cause.RED_LIGHT] = place(lit & must_stop(scene.light(state.time_s), line, speed), stop)
    signed = (scene.control == int(Control.STOP_SIGN)) & (line > -1.0) & (line < _SIGHT_M)
    reasons[Cause.STOP_SIGN] = place(signed & ~state.stopped, stop)
    reasons[Cause.PEDESTRIAN] = people(*_pedestrians(scene, state))
    reasons[Cause.CROSS_TRAFFIC] = people(*_cross_traffic(scene, state))

    bends = (scene.road.curvature_at(state.s[:, None] + _AHEAD.to(speed.device)).abs()).clamp(min=1e-6)
    turning = scene.turn != 0
    limit = (2.0 / bends).sqrt()
    # One metre per second squared and a half is how the expert slows down for a place.
    allowed = (limit * limit + 3.0 * (_AHEAD.to(speed.device) - 1.0).clamp(min=0)).sqrt().amin(dim=1)
    slower = ((allowed - speed) / 0.7).clamp(-3.5, 2.0)
    bent = allowed < scene.speed_limit + 2.0
    reasons[Cause.TURN] = place(bent & turning, slower)
    reasons[Cause.CURVE] = place(bent & ~turning, slower)
    to_bump = scene.bump_s - state.front_s
    over = (to_bump > -(4.8 + 0.5)) & (to_bump < 50.0)
    allowed = (16.0 + 2.4 * (to_bump - 1.0).clamp(min=0)).sqrt()
    reasons[Cause.SPEED_BUMP] = place(over, ((allowed - speed) / 0.7).clamp(-3.5, 2.0))

    # Looking for a gap: behind whoever is ahead in the other lane, and never past the end of this one.
    behind_them = follow(
        lateral.gap_ahead.clamp(max=1e4), speed[:, None].expand_as(rear), speed[:, None] - state.agent_speed
    )
    gap = people((lateral.gap_ahead < 30.0) & (scene.merge_s < 1e5)[:, None], behind_them.clamp(min=-2.0))
    end = torch.where(
        lateral.searching & (scene.merge_s < 1e5), halt(scene.merge_s - 42.0 - state.front_s, speed), none
    )
    reasons[Cause.GAP] = _Reason(torch.minimum(gap.accel, end), gap.actor)
    return reasons


#: Where the expert looks at the curvature of the road, metres ahead of the rear axle.
_AHEAD = torch.tensor([0.0, 3.0, 6.0, 9.0, 12.0, 16.0, 20.0, 25.0, 30.0, 36.0, 44.0], dtype=torch.float64)


def _pedestrians(scene: Scene, state: State) -> tuple[Tensor, Tensor]:
    """Pedestrians that cross: who makes the ego stop [S, A], and the acceleration for each."""
    agents = scene.agents
    crosses = (agents.kind == int(Kind.PEDESTRIAN)) & (agents.d_target != agents.d0) & state.agent_moving
    offset = state.agent_d - state.d[:, None]
    approaching = offset * state.agent_rate < 0
    pace = state.agent_rate.abs().clamp(min=0.1)
    corridor = 0.5 * EGO_WIDTH_M + 1.2
    enters = (offset.abs() - corridor) / pace
    inside = (offset.abs() < corridor) & (approaching | (offset.abs() < corridor - 0.3))
    gap = state.agent_s - 2.8 - state.front_s[:, None]
    line = (scene.stop_line_s - state.front_s)[:, None]
    gap = torch.where(line > -0.5, torch.minimum(gap, line.expand_as(gap)), gap)
    leaves = (state.agent_s + 1.0 - (state.s[:, None] - EGO_REAR_M)) / state.speed[:, None].clamp(min=0.5)
    conflict = inside | (approaching & (enters < 6.0) & (enters - 0.8 < leaves))
    return crosses & conflict & (gap > -2.0) & (gap < _SIGHT_M), halt(gap, state.speed[:, None].expand_as(gap))


def _cross_traffic(scene: Scene, state: State) -> tuple[Tensor, Tensor]:
    """Vehicles on the crossing road, and oncoming ones that a left turn has to let pass."""
    agents, speed = scene.agents, state.speed
    line = scene.stop_line_s - state.front_s
    arrives = line.clamp(min=0) / speed.clamp(min=1.0)
    clears = (scene.junction_s + 4.0 + EGO_REAR_M - state.s) / speed.clamp(min=4.0)
    fast = agents.lateral_speed > 3.0
    pace = state.agent_rate.abs().clamp(min=0.5)
    approaching = state.agent_d * state.agent_rate < 0
    to_lane = torch.where(approaching, state.agent_d.abs(), -state.agent_d.abs())
    enters = (to_lane - 0.5 * agents.length - 2.5) / pace
    leaves = (to_lane + 0.5 * agents.length + 2.5) / pace
    # From afar it rather expects a conflict than not, so that it seldom changes its mind near the line.
    doubt = 0.06 * line.clamp(min=0, max=40.0)[:, None]
    cross = fast & (leaves > 0) & (enters < clears[:, None] + 0.8 + doubt) & (leaves > arrives[:, None] - 0.5 - doubt)

    left_turn = (scene.turn > 0)[:, None] & (agents.direction < 0)
    pace = state.agent_speed.clamp(min=0.5)
    zone_far, zone_near = scene.turn_s + 13.0, scene.turn_s + 1.0
    enters = (state.agent_s - 0.5 * agents.length - zone_far[:, None]) / pace
    leaves = (state.agent_s + 0.5 * agents.length - zone_near[:, None]) / pace
    clears = (scene.turn_s + 14.0 + EGO_REAR_M - state.s) / speed.clamp(min=3.2)
    oncoming = left_turn & (leaves > 0) & (enters < clears[:, None] + 2.2) & (leaves > arrives[:, None] - 0.5)
    ahead = ((line > -0.8) & (line < 45.0))[:, None]
    return (cross | oncoming) & ahead, halt(line, speed)[:, None].expand_as(state.agent_s)
