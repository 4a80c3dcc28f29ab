"""How everybody but the ego moves: intelligent-driver model along the road, straight lines across it."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.world.scene import (
    DT_S,
    EGO_FRONT_M,
    EGO_REAR_M,
    EGO_WIDTH_M,
    Kind,
    Light,
    Scene,
)
from flashdrive_node.world.state import State

#: Stands for "no reason to brake", m/s^2.
NO_REASON = 1e3


def follow(
    gap_m: Tensor,
    speed: Tensor,
    closing: Tensor,
    headway_s: float = 1.3,
    standing_m: float = 3.0,
    accel: float = 1.6,
    brake: float = 2.2,
) -> Tensor:
    """Acceleration of the intelligent-driver model for one vehicle ahead, without its free-road term, and with calm.

    Args:
        gap_m: Bumper to bumper.
        speed: Own.
        closing: Own speed less that of the vehicle ahead.
        headway_s, standing_m, accel, brake: Of the model.
    """
    dynamic = speed * headway_s + speed * closing / (2 * (accel * brake) ** 0.5)
    wanted = standing_m + dynamic.clamp(min=0)
    pull = accel * (1 - (wanted / gap_m.clamp(min=0.3)) ** 2)
    # The plain model brakes for all it is worth when somebody moves in close ahead; what is needed is little.
    needed = closing.clamp(min=0) ** 2 / (2 * (gap_m - 1.5).clamp(min=0.3))
    return torch.maximum(pull, -(2.4 + 2.0 * needed))


def halt(gap_m: Tensor, speed: Tensor) -> Tensor:
    """Acceleration that brings a vehicle to rest one metre before a line that is gap_m ahead."""
    return follow(gap_m, speed, speed, headway_s=0.5, standing_m=1.0, accel=1.6, brake=2.0)


def free_road(speed: Tensor, wanted: Tensor, accel: Tensor | float = 1.6) -> Tensor:
    """Acceleration on a free road towards a wanted speed."""
    ratio = speed / wanted.clamp(min=0.1)
    return (accel * (1 - ratio**4)).clamp(min=-2.0)


def scheduled_speed(scene: Scene, time_s: Tensor) -> Tensor:
    """Speed that every agent wants at a time: [S] -> [S, A]."""
    passed = (time_s[:, None, None] >= scene.agents.times).sum(dim=2, keepdim=True)
    return scene.agents.speeds.gather(2, passed)[..., 0]


def must_stop(light: Tensor, gap_m: Tensor, speed: Tensor) -> Tensor:
    """Whether a light that far ahead makes a vehicle stop: red, or yellow with room to stop."""
    comfortable = speed * speed < 2 * 3.0 * gap_m
    return (gap_m > -0.3) & ((light == int(Light.RED)) | ((light == int(Light.YELLOW)) & comfortable))


def advance_agents(scene: Scene, state: State) -> dict[str, Tensor]:
    """Fields of the next state that belong to agents."""
    agents = scene.agents
    direction = agents.direction.to(state.agent_s.dtype)
    speed = state.agent_speed
    accel = _along(scene, state, direction)
    after = (speed + accel * DT_S).clamp(min=0)
    s = state.agent_s + direction * 0.5 * (speed + after) * DT_S

    trigger = agents.trigger_s
    reach = (state.agent_s - state.front_s[:, None]) / state.speed[:, None].clamp(min=1.0)
    now = torch.where(trigger < 0, state.time_s[:, None] >= -trigger, (reach < trigger) & (reach > 0))
    # Nobody moves into the ego's lane beside it.
    room = (agents.direction == 0) | (state.agent_s - 0.5 * agents.length - state.front_s[:, None] > 5.0)
    moving = state.agent_moving | (now & room & (agents.lateral_speed > 0)) | (trigger > 1e3)
    # They arrive gently and start within half a second; the fast ones, on a crossing road, keep their speed.
    to_go = agents.d_target - state.agent_d
    crossing = agents.lateral_speed > 3.0
    reached = torch.maximum(torch.minimum(to_go * 0.8, agents.lateral_speed), -agents.lateral_speed)
    rate = state.agent_rate + (reached - state.agent_rate) * 0.25
    rate = torch.where(crossing, reached, rate)
    rate = torch.where(moving, rate, torch.zeros_like(rate))
    return {
        "agent_s": s,
        "agent_d": state.agent_d + rate * DT_S,
        "agent_speed": after,
        "agent_accel": (after - speed) / DT_S,
        "agent_rate": rate,
        "agent_moving": moving,
    }


def _along(scene: Scene, state: State, direction: Tensor) -> Tensor:
    """Acceleration along the road [S, A]."""
    agents = scene.agents
    speed = state.agent_speed
    wanted = scheduled_speed(scene, state.time_s)
    bend = torch.zeros_like(speed)
    for ahead in (0.0, 5.0, 10.0, 16.0):
        bend = torch.maximum(bend, scene.road.curvature_at(state.agent_s + direction * ahead).abs())
    bend = torch.where(agents.straight_on, torch.zeros_like(bend), bend)
    wanted = torch.minimum(wanted, (2.2 / bend.clamp(min=1e-6)).sqrt())
    accel = torch.where(wanted < speed - 0.1, -agents.brake.clamp(max=5.0), free_road(speed, wanted))
    accel = torch.where(wanted < speed - 0.1, torch.maximum(accel, (wanted - speed) * 1.5), accel)

    # The ego is one more vehicle to follow.
    middle = state.s + 0.5 * (EGO_FRONT_M - EGO_REAR_M)
    other_s = torch.cat((state.agent_s, middle[:, None]), dim=1)[:, None]
    other_d = torch.cat((state.agent_d, state.d[:, None]), dim=1)[:, None]
    length = torch.cat((agents.length, torch.full_like(middle, EGO_FRONT_M + EGO_REAR_M)[:, None]), dim=1)[:, None]
    width = torch.cat((agents.width, torch.full_like(middle, EGO_WIDTH_M)[:, None]), dim=1)[:, None]
    along = torch.cat((speed * direction, state.speed[:, None]), dim=1)[:, None]
    there = torch.cat((agents.kind != int(Kind.NOTHING), torch.ones_like(middle, dtype=torch.bool)[:, None]), dim=1)
    distance = direction[:, :, None] * (other_s - state.agent_s[:, :, None])
    gap = distance - 0.5 * (length + agents.length[:, :, None])
    near = (other_d - state.agent_d[:, :, None]).abs() < 0.5 * (width + agents.width[:, :, None]) + 0.35
    closing = speed[:, :, None] - direction[:, :, None] * along
    pull = follow(gap, speed[:, :, None].expand_as(gap), closing)
    pull = torch.where((distance > 0) & near & there[:, None], pull, torch.full_like(pull, NO_REASON))
    accel = torch.minimum(accel, pull.amin(dim=2))

    light = scene.light(state.time_s)[:, None]
    far_line = 2 * scene.junction_s - scene.stop_line_s
    line = torch.where(agents.direction > 0, scene.stop_line_s[:, None], far_line[:, None])
    gap = direction * (line - state.agent_s) - 0.5 * agents.length
    stop = must_stop(light, gap, speed) & (agents.direction != 0)
    accel = torch.where(stop, torch.minimum(accel, halt(gap, speed)), accel)
    return accel.clamp(-8.0, 2.0)
