"""Driving scenes step by step, in lock-step, by the expert or by given actions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.world.expert import Decision, decide
from flashdrive_node.world.scene import DT_S, Control, Scene
from flashdrive_node.world.state import State, feasible, first_state, unicycle
from flashdrive_node.world.traffic import advance_agents


def advance(
    scene: Scene, state: State, action: Tensor | None = None, disturbance: Tensor | None = None
) -> tuple[State, Decision]:
    """One step of DT_S.

    Args:
        scene, state: S scenes.
        action: Acceleration and curvature of the ego [S, 2], m/s^2 and 1/m; without it the expert drives.
        disturbance: Added to the expert's action where it drives [S, 2], m/s^2 and 1/m.

    Returns:
        The next state, and the expert's decision in the present one (whoever drives).
    """
    decision = decide(scene, state)
    if action is None and disturbance is None:
        accel, curvature = decision.accel, decision.curvature
    else:
        wish = torch.stack((decision.accel, decision.curvature), dim=1) if action is None else action
        wish = wish if disturbance is None else wish + disturbance
        accel, curvature = feasible(wish[:, 0], wish[:, 1], state.speed)
    x, y, yaw, speed = unicycle(state.x, state.y, state.yaw, state.speed, accel, curvature)
    point = scene.road.project(x[:, None], y[:, None], state.s[:, None])
    line = scene.stop_line_s - state.front_s
    waits = (scene.control == int(Control.STOP_SIGN)) & (line > -1.0) & (line < 3.0) & (state.speed < 0.25)
    waited = state.waited_s + waits * DT_S
    following = State(
        time_s=state.time_s + DT_S,
        x=x,
        y=y,
        yaw=yaw,
        speed=speed,
        accel=accel,
        s=point.s[:, 0],
        d=point.d[:, 0],
        aim_d=decision.aim_d,
        aim_rate=decision.aim_rate,
        changing=decision.changing,
        waited_s=waited,
        stopped=state.stopped | (waited > 0.95),
        **advance_agents(scene, state),
    )
    return following, decision


@dataclass(frozen=True)
class Rollout:
    """What an expert does over T steps. Poses are those after each step."""

    #: Acceleration and curvature [S, T, 2], m/s^2 and 1/m.
    actions: Tensor
    #: World x, y, yaw, speed [S, T, 4].
    poses: Tensor
    #: `Cause` in each step [S, T].
    cause: Tensor


def rollout(scene: Scene, state: State, steps: int) -> Rollout:
    """Let the expert drive on from any state: the label of that state, recovery included."""
    actions, poses, causes = [], [], []
    for _ in range(steps):
        before = state
        state, decision = advance(scene, before)
        actions.append(torch.stack((decision.accel, decision.curvature), dim=1))
        poses.append(torch.stack((state.x, state.y, state.yaw, state.speed), dim=1))
        causes.append(decision.cause)
    return Rollout(torch.stack(actions, dim=1), torch.stack(poses, dim=1), torch.stack(causes, dim=1))


def drive(scene: Scene, steps: int) -> tuple[list[State], list[Decision]]:
    """The expert from the start: steps + 1 states and steps decisions."""
    states, decisions = [first_state(scene)], []
    for _ in range(steps):
        state, decision = advance(scene, states[-1])
        states.append(state)
        decisions.append(decision)
    return states, decisions
