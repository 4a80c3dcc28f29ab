"""What must not happen: collisions, leaving the road, running a red light or a stop sign."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.scene import (
    EGO_FRONT_M,
    EGO_REAR_M,
    EGO_WIDTH_M,
    Control,
    Kind,
    Light,
    Scene,
)
from flashdrive_node.world.state import State, agent_poses, ego_middle


class Faults(NamedTuple):
    """What happened between two moments: bool [S] each."""

    #: Touches a vehicle, cyclist or cone with its front; these the ego could have avoided.
    front_collision: Tensor
    #: Touches one otherwise.
    other_collision: Tensor
    pedestrian: Tensor
    off_road: Tensor
    red_light: Tensor
    #: Crosses a stop line without having stopped.
    stop_sign: Tensor

    @property
    def any(self) -> Tensor:
        """Any of them [S]."""
        return torch.stack(tuple(self)).any(dim=0)


def no_faults(scene: Scene) -> Faults:
    """A clean sheet."""
    return Faults(*(torch.zeros(len(scene), dtype=torch.bool, device=scene.device) for _ in Faults._fields))


def faults(scene: Scene, before: State, after: State) -> Faults:
    """What went wrong in a step."""
    agents = scene.agents
    x, y, yaw = agent_poses(scene, after)
    mx, my = ego_middle(after)
    touching = boxes_overlap(
        (mx[:, None], my[:, None], after.yaw[:, None], EGO_FRONT_M + EGO_REAR_M, EGO_WIDTH_M),
        (x, y, yaw, agents.length, agents.width),
    )
    touching = touching & (agents.kind != int(Kind.NOTHING))
    person = agents.kind == int(Kind.PEDESTRIAN)
    ahead = (x - mx[:, None]) * after.yaw.cos()[:, None] + (y - my[:, None]) * after.yaw.sin()[:, None]
    # From its middle forward, and moving: what runs into a standing or slower ego from behind is not its fault.
    front = (ahead > 0.8) & (after.speed > 0.2)[:, None]
    left = torch.maximum(*_corner_d(scene, after)[:2])
    right = torch.minimum(*_corner_d(scene, after)[2:])
    edge = scene.right_edge(torch.stack((after.s, after.front_s), dim=1)).amax(dim=1)
    off = (left > scene.left_edge + 0.15) | (right < edge - 0.15)
    crossed = (before.front_s <= scene.stop_line_s) & (after.front_s > scene.stop_line_s)
    red = scene.light(after.time_s) == int(Light.RED)
    return Faults(
        front_collision=(touching & front & ~person).any(dim=1),
        other_collision=(touching & ~front & ~person).any(dim=1),
        pedestrian=(touching & person & (after.speed > 0.2)[:, None]).any(dim=1),
        off_road=off,
        red_light=crossed & red & (scene.control == int(Control.LIGHT)),
        stop_sign=crossed & ~before.stopped & (scene.control == int(Control.STOP_SIGN)),
    )


def _corner_d(scene: Scene, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets of the rear left, front left, rear right and front right corner from the road's centre [S]."""
    corners = []
    for side in (0.5, -0.5):
        for along in (-EGO_REAR_M, EGO_FRONT_M):
            x = state.x + along * state.yaw.cos() - side * EGO_WIDTH_M * state.yaw.sin()
            y = state.y + along * state.yaw.sin() + side * EGO_WIDTH_M * state.yaw.cos()
            corners.append((x, y))
    x = torch.stack([c[0] for c in corners], dim=1)
    y = torch.stack([c[1] for c in corners], dim=1)
    d = scene.road.project(x, y, state.s[:, None].expand_as(x)).d
    return d[:, 0], d[:, 1], d[:, 2], d[:, 3]


def boxes_overlap(a: tuple, b: tuple) -> Tensor:
    """Whether rectangles (x, y, yaw, length, width) overlap; shapes broadcast. By separating axes."""
    ax, ay, ayaw, al, aw = a
    bx, by, byaw, bl, bw = b
    dx, dy, turn = bx - ax, by - ay, byaw - ayaw
    c, s = turn.cos().abs(), turn.sin().abs()

    def apart(yaw: Tensor, l1: Tensor, w1: Tensor, l2: Tensor, w2: Tensor) -> Tensor:
        along = (dx * yaw.cos() + dy * yaw.sin()).abs()
        across = (dy * yaw.cos() - dx * yaw.sin()).abs()
        return (along > 0.5 * (l1 + l2 * c + w2 * s)) | (across > 0.5 * (w1 + l2 * s + w2 * c))

    return ~(apart(ayaw, al, aw, bl, bw) | apart(byaw, bl, bw, al, aw))
