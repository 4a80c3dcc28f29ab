"""Where everybody is at one time, and how the ego moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.world.scene import DT_S, EGO_FRONT_M, EGO_REAR_M, Scene

#: What the ego's actuators allow, m/s^2 and 1/m.
ACCEL_MIN, ACCEL_MAX, CURVATURE_MAX = -8.0, 3.0, 0.2


@dataclass(frozen=True)
class State:
    """A moment of S scenes. World frame, metres, m/s, radians; [S], agents [S, A]."""

    time_s: Tensor
    #: The ego's rear axle.
    x: Tensor
    y: Tensor
    yaw: Tensor
    speed: Tensor
    #: What was done in the last step.
    accel: Tensor
    #: Road coordinates of the rear axle.
    s: Tensor
    d: Tensor
    #: Where in the lane the ego is steered to, and how fast that moves.
    aim_d: Tensor
    aim_rate: Tensor
    #: The wanted lane change has begun.
    changing: Tensor
    #: Seconds spent standing at the stop line, and whether that was enough.
    waited_s: Tensor
    stopped: Tensor
    agent_s: Tensor
    agent_d: Tensor
    agent_speed: Tensor
    #: Along the road, in the last step.
    agent_accel: Tensor
    #: Speed to the left.
    agent_rate: Tensor
    #: It has begun to move sideways.
    agent_moving: Tensor

    @property
    def front_s(self) -> Tensor:
        """Road coordinate of the front bumper [S]."""
        return self.s + EGO_FRONT_M


def first_state(scene: Scene) -> State:
    """All scenes at time zero: the ego at the origin, heading along x."""
    zero = torch.zeros_like(scene.start_speed)
    no = torch.zeros_like(zero, dtype=torch.bool)
    agents = scene.agents
    still = torch.zeros_like(agents.s0)
    return State(
        time_s=zero,
        x=zero,
        y=zero,
        yaw=zero,
        speed=scene.start_speed,
        accel=zero,
        s=zero,
        d=zero,
        aim_d=zero,
        aim_rate=zero,
        changing=no,
        waited_s=zero,
        stopped=no,
        agent_s=agents.s0,
        agent_d=agents.d0,
        agent_speed=agents.speeds[:, :, 0],
        agent_accel=still,
        agent_rate=still,
        agent_moving=torch.zeros_like(agents.s0, dtype=torch.bool),
    )


def feasible(accel: Tensor, curvature: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
    """The action that a wish becomes: within the actuators, and never backwards."""
    accel = torch.maximum(accel.clamp(ACCEL_MIN, ACCEL_MAX), -speed / DT_S)
    return accel, curvature.clamp(-CURVATURE_MAX, CURVATURE_MAX)


def unicycle(
    x: Tensor, y: Tensor, yaw: Tensor, speed: Tensor, accel: Tensor, curvature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step in the convention of the action space: both held, positions by the trapezoid rule.

    Returns:
        x, y, yaw, speed after DT_S.
    """
    after = speed + accel * DT_S
    turned = yaw + curvature * speed * DT_S + curvature * accel * (0.5 * DT_S**2)
    x = x + 0.5 * DT_S * (speed * yaw.cos() + after * turned.cos())
    y = y + 0.5 * DT_S * (speed * yaw.sin() + after * turned.sin())
    return x, y, turned, after


def perturb(scene: Scene, state: State, lateral_m: Tensor, heading: Tensor, speed_factor: Tensor) -> State:
    """The same moment with the ego displaced: where recovery is learned from.

    Args:
        scene, state: S scenes.
        lateral_m: To the left [S], metres.
        heading: To the left [S], radians.
        speed_factor: [S].
    """
    values = dict(vars(state))
    values["x"] = state.x - lateral_m * state.yaw.sin()
    values["y"] = state.y + lateral_m * state.yaw.cos()
    values["yaw"] = state.yaw + heading
    values["speed"] = state.speed * speed_factor
    point = scene.road.project(values["x"][:, None], values["y"][:, None], state.s[:, None])
    values["s"], values["d"] = point.s[:, 0], point.d[:, 0]
    return State(**values)


def agent_poses(scene: Scene, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """World x, y and heading of the middle of every agent: [S, A] each."""
    agents = scene.agents
    x, y, yaw = scene.road.pose_at(state.agent_s, state.agent_d)
    x0, y0, yaw0, s0 = (v[:, None] for v in scene.junction_frame.unbind(1))
    along = state.agent_s - s0
    straight = agents.straight_on
    x = torch.where(straight, x0 + along * yaw0.cos() - state.agent_d * yaw0.sin(), x)
    y = torch.where(straight, y0 + along * yaw0.sin() + state.agent_d * yaw0.cos(), y)
    yaw = torch.where(straight, yaw0.expand_as(yaw), yaw)
    forward = state.agent_speed * agents.direction
    # Across the road they face where they go, also before they go; what stands faces along the road.
    across = (agents.direction == 0) & (agents.d_target != agents.d0)
    facing = torch.atan2(
        torch.where(across, agents.d_target - agents.d0, state.agent_rate),
        torch.where(across, torch.zeros_like(x), forward),
    )
    slow = (forward.abs() < 0.3) & ~across
    facing = torch.where(slow, torch.where(agents.direction < 0, torch.pi, 0.0).to(x.dtype), facing)
    return x, y, yaw + facing


def ego_middle(state: State) -> tuple[Tensor, Tensor]:
    """World position of the middle of the ego's body [S]."""
    ahead = 0.5 * (EGO_FRONT_M - EGO_REAR_M)
    return state.x + ahead * state.yaw.cos(), state.y + ahead * state.yaw.sin()
