"""Where in the road the expert wants to be, and the curvature that takes it there."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.scene import DT_S, EGO_REAR_M, EGO_WIDTH_M, Kind, Scene
from flashdrive_node.world.state import State

#: Beyond this offset the ego's body is out of its lane, metres.
OUT_OF_LANE_M = 0.8
_FREQUENCY = 1.0  # of the filter that moves the aim sideways, rad/s
_RATE_M_S = 1.4


class Manoeuvre(IntEnum):
    """What the expert does sideways."""

    KEEP = 0
    NUDGE = 1
    LANE_CHANGE = 2
    MERGE = 3
    TURN_LEFT = 4
    TURN_RIGHT = 5


class Aim(NamedTuple):
    """Lateral intention of S scenes."""

    #: Offset to drive at [S], metres.
    goal_d: Tensor
    #: `Manoeuvre` [S].
    manoeuvre: Tensor
    #: The agent that the ego passes, or the one whose lane it leaves [S]; -1 for nobody.
    actor: Tensor
    #: Waits behind what it would pass, since somebody is oncoming: distance to it [S, A], inf where not.
    blocked_gap: Tensor
    #: Passes something, so drives slowly [S].
    passing: Tensor
    #: The lane change has begun, or is beginning [S].
    changing: Tensor
    #: Wants to change lanes and cannot yet [S], and behind whom it would have to go [S, A].
    searching: Tensor
    gap_ahead: Tensor


def aim(scene: Scene, state: State) -> Aim:
    """Decide sideways."""
    agents = scene.agents
    nobody = torch.full_like(scene.turn, -1)
    inf = torch.full_like(state.agent_s, torch.inf)
    rear = state.agent_s - 0.5 * agents.length - state.front_s[:, None]
    behind = state.s[:, None] - EGO_REAR_M - (state.agent_s + 0.5 * agents.length)

    # Things to pass with room to the side.
    look = (state.speed * 5.0).clamp(min=28.0)[:, None]
    clearance = torch.where(
        agents.kind == int(Kind.CYCLIST), 1.1, torch.where(agents.kind == int(Kind.CONE), 0.55, 0.7)
    )
    need = state.agent_d + 0.5 * agents.width + clearance + 0.5 * EGO_WIDTH_M
    beside = agents.nudge & (rear < look) & (behind < 1.0) & (need > 0)
    need = torch.where(beside, need, torch.zeros_like(need))
    offset, passed = need.max(dim=1)
    far_end = torch.where(beside, state.agent_s + 0.5 * agents.length, -inf).amax(dim=1)
    near_end = torch.where(beside, rear, inf).amin(dim=1)
    meets = _oncoming_meets(scene, state, near_end, far_end)
    committed = state.d > 0.5 * offset
    blocked = (offset > OUT_OF_LANE_M) & meets & ~committed
    nudging = (offset > 0.15) & ~blocked
    blocked_gap = torch.where(blocked[:, None] & beside, rear, inf)

    # The wanted lane change.
    wants = (scene.change_d != 0) & (state.s >= scene.change_s)
    lead = (state.agent_d.abs() < 1.2) & (rear > 0) & (rear < 32.0) & (agents.direction > 0)
    merging = scene.merge_s < 1e5
    wants = wants & (merging | lead.any(dim=1))
    in_lane = (state.agent_d - scene.change_d[:, None]).abs() < 1.6
    in_lane = in_lane & (agents.direction > 0) & (agents.kind != int(Kind.NOTHING))
    faster = state.agent_speed - state.speed[:, None]
    ahead_free = rear > 5.0 + 2.5 * (-faster).clamp(min=0)
    behind_free = behind > 6.0 + 3.0 * faster.clamp(min=0)
    obstructs = in_lane & ~ahead_free & ~behind_free
    gap_free = ~obstructs.any(dim=1)
    changing = state.changing | (wants & gap_free & (state.speed > 1.5))
    searching = wants & ~changing
    front = in_lane & (state.agent_s > state.s[:, None]) & searching[:, None]
    gap_ahead = torch.where(front, rear, inf)

    slow_lead = torch.where(lead, rear, inf).argmin(dim=1)
    under_way = changing & ((state.d - scene.change_d).abs() > 0.5)
    turn_near = (state.front_s > scene.turn_s - 12.0) & (state.s < scene.turn_s + 14.0) & (scene.turn != 0)
    manoeuvre = torch.where(nudging, int(Manoeuvre.NUDGE), int(Manoeuvre.KEEP))
    lane_change = torch.where(merging, int(Manoeuvre.MERGE), int(Manoeuvre.LANE_CHANGE))
    manoeuvre = torch.where(under_way, lane_change, manoeuvre)
    turning = torch.where(scene.turn > 0, int(Manoeuvre.TURN_LEFT), int(Manoeuvre.TURN_RIGHT))
    manoeuvre = torch.where(turn_near, turning, manoeuvre)
    actor = torch.where(nudging, passed, torch.where(under_way & lead.any(dim=1), slow_lead, nobody))
    goal = torch.where(changing, scene.change_d, torch.zeros_like(offset))
    goal = torch.where(nudging, torch.maximum(goal, offset), goal)
    return Aim(goal, manoeuvre, actor, blocked_gap, nudging, changing, searching, gap_ahead)


def _oncoming_meets(scene: Scene, state: State, near_end: Tensor, far_end: Tensor) -> Tensor:
    """Whether an oncoming vehicle would meet the ego beside what it passes: [S]."""
    agents = scene.agents
    speed = state.speed.clamp(min=4.0)
    start = state.front_s + (near_end - 10.0).clamp(min=0)
    arrive = (start - state.front_s) / speed
    leave = (far_end + 6.0 - state.s) / speed
    front = state.agent_s - 0.5 * agents.length
    tail = state.agent_s + 0.5 * agents.length
    gone_by = tail - state.agent_speed * arrive[:, None] < start[:, None] - 4.0
    still_far = front - state.agent_speed * leave[:, None] > far_end[:, None] + 10.0
    oncoming = (agents.direction < 0) & (tail > state.s[:, None] - EGO_REAR_M)
    return (oncoming & ~gone_by & ~still_far).any(dim=1)


def move_aim(state: State, goal_d: Tensor) -> tuple[Tensor, Tensor]:
    """Critically damped motion of the aim towards its goal, slower at walking pace: new (aim_d, aim_rate), [S]."""
    pull = _FREQUENCY**2 * (goal_d - state.aim_d) - 2 * _FREQUENCY * state.aim_rate
    rate = (state.aim_rate + pull * DT_S).clamp(-_RATE_M_S, _RATE_M_S)
    pace = (state.speed / 4.0).clamp(max=1.0)
    return state.aim_d + rate * pace * DT_S, torch.where(state.speed > 0.1, rate, torch.zeros_like(rate))


def pursue(scene: Scene, state: State, aim_d: Tensor, aim_rate: Tensor) -> Tensor:
    """Curvature of the arc to a point ahead on the wanted line (pure pursuit): [S], 1/m."""
    reach = (0.9 * state.speed).clamp(min=3.5, max=14.0)
    later = reach / state.speed.clamp(min=3.0)
    target_d = aim_d + 0.6 * aim_rate * later
    x, y, _ = scene.road.pose_at((state.s + reach)[:, None], target_d[:, None])
    dx, dy = x[:, 0] - state.x, y[:, 0] - state.y
    left = -state.yaw.sin() * dx + state.yaw.cos() * dy
    return 2 * left / (dx * dx + dy * dy).clamp(min=4.0)
