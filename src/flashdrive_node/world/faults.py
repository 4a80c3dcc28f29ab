"""What must not happen: collisions, leaving the road, running a red light or a stop sign."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.scene import (
    EGO_FRONT_M,
    EGO_REAR_M,
    EGO_WIDTH_M,
    LANE_M,
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


class Contacts(NamedTuple):
    """What the ego's body touches at one moment, by where and whether it moves itself: bool [S] each.

    Vehicles, cyclists and cones; a standing ego is touched, it touches nobody.
    """

    #: With its front.
    front: Tensor
    #: With its side.
    side: Tensor
    #: From behind, or while it stands.
    suffered: Tensor
    #: A pedestrian, anywhere.
    pedestrian: Tensor


def no_faults(scene: Scene) -> Faults:
    """A clean sheet."""
    return Faults(*(torch.zeros(len(scene), dtype=torch.bool, device=scene.device) for _ in Faults._fields))


def contacts(scene: Scene, state: State) -> Contacts:
    """Whom the ego touches."""
    agents = scene.agents
    x, y, yaw = agent_poses(scene, state)
    mx, my = ego_middle(state)
    length = EGO_FRONT_M + EGO_REAR_M
    touching = boxes_overlap(
        (mx[:, None], my[:, None], state.yaw[:, None], length, EGO_WIDTH_M),
        (x, y, yaw, agents.length, agents.width),
    )
    touching = touching & (agents.kind != int(Kind.NOTHING))
    person = agents.kind == int(Kind.PEDESTRIAN)
    ahead = (x - mx[:, None]) * state.yaw.cos()[:, None] + (y - my[:, None]) * state.yaw.sin()[:, None]
    moving = (state.speed > 0.2)[:, None]
    # From its middle forward, and moving: what runs into a standing or slower ego from behind is not its fault.
    front = moving & (ahead > 0.8)
    side = moving & ~front & (ahead > -0.5 * length)
    return Contacts(
        front=(touching & ~person & front).any(dim=1),
        side=(touching & ~person & side).any(dim=1),
        suffered=(touching & ~person & ~front & ~side).any(dim=1),
        pedestrian=(touching & person & moving).any(dim=1),
    )


def faults(scene: Scene, before: State, after: State, touched: Contacts | None = None) -> Faults:
    """What went wrong in a step; `touched` is `contacts(scene, after)` where that is known."""
    touched = touched or contacts(scene, after)
    corners = _corner_d(scene, after)
    left, right = torch.maximum(*corners[:2]), torch.minimum(*corners[2:])
    edge = scene.right_edge(torch.stack((after.s, after.front_s), dim=1)).amax(dim=1)
    off = (left > scene.left_edge + 0.15) | (right < edge - 0.15)
    crossed = (before.front_s <= scene.stop_line_s) & (after.front_s > scene.stop_line_s)
    red = scene.light(after.time_s) == int(Light.RED)
    return Faults(
        front_collision=touched.front,
        other_collision=touched.side | touched.suffered,
        pedestrian=touched.pedestrian,
        off_road=off,
        red_light=crossed & red & (scene.control == int(Control.LIGHT)),
        stop_sign=crossed & ~before.stopped & (scene.control == int(Control.STOP_SIGN)),
    )


def out_of_lane(scene: Scene, state: State) -> Tensor:
    """Whether a corner of the ego's body is beyond the edges of the lane that its rear axle is in: bool [S]."""
    middle = LANE_M * (state.d / LANE_M).round()
    return (torch.stack(_corner_d(scene, state), dim=1) - middle[:, None]).abs().amax(dim=1) > 0.5 * LANE_M


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
