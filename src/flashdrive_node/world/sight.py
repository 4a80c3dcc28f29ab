"""What the cameras can see of a scene: the only evidence that a sentence may name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.expert import Cause
from flashdrive_node.world.scene import Control, Kind, Scene
from flashdrive_node.world.state import State, agent_poses

#: Steps over which evidence counts: 2 s.
EVIDENCE_STEPS = 20
#: Distance at which each `Kind` is a few pixels in the wide or a dozen in the tele camera, metres.
_REACH_M = (0.0, 110.0, 130.0, 65.0, 60.0, 50.0)
#: Half of the view of the four cameras together, radians, and where they look from, metres ahead of the rear axle.
_HALF_VIEW, _CAMERA_AHEAD_M = 1.95, 1.75
#: Fog hides what is farther than this many times its visibility.
_THROUGH_FOG = 2.0


class Sight(NamedTuple):
    """What can be seen: bool."""

    #: [S, A].
    agents: Tensor
    #: The traffic light, the stop sign, and the shape of the road ahead [S].
    light: Tensor
    stop_sign: Tensor
    road: Tensor


def sight(scene: Scene, state: State) -> Sight:
    """What the cameras see at one moment."""
    agents = scene.agents
    x, y, yaw = agent_poses(scene, state)
    cx = (state.x + _CAMERA_AHEAD_M * state.yaw.cos())[:, None]
    cy = (state.y + _CAMERA_AHEAD_M * state.yaw.sin())[:, None]
    distance = torch.sqrt((x - cx) ** 2 + (y - cy) ** 2)
    bearing = torch.atan2(y - cy, x - cx) - state.yaw[:, None]
    bearing = torch.atan2(bearing.sin(), bearing.cos()).abs()
    fog = _THROUGH_FOG * scene.weather.visibility
    reach = torch.tensor(_REACH_M, dtype=x.dtype, device=x.device)[agents.kind]
    seen = (distance < reach) & (distance < fog[:, None]) & (bearing < _HALF_VIEW)
    # Either side of the body may show past what stands in front.
    side = 0.4 * agents.width
    across = torch.atan2(y - cy, x - cx)
    hidden = torch.ones_like(seen)
    for sign in (-1.0, 1.0):
        px, py = x - sign * side * across.sin(), y + sign * side * across.cos()
        hidden = hidden & _behind_something(scene, x, y, yaw, cx, cy, px, py)
    to_line = scene.stop_line_s - state.front_s
    ahead = (to_line > -12.0) & (to_line < 75.0) & (to_line < fog)
    return Sight(
        seen & ~hidden,
        ahead & (scene.control == int(Control.LIGHT)),
        ahead & (scene.control == int(Control.STOP_SIGN)) & (to_line > -3.0),
        torch.ones_like(ahead),
    )


def _behind_something(
    scene: Scene, x: Tensor, y: Tensor, yaw: Tensor, cx: Tensor, cy: Tensor, px: Tensor, py: Tensor
) -> Tensor:
    """Whether the line from the camera to a point of each agent passes through another vehicle: bool [S, A]."""
    agents = scene.agents
    blocks = (agents.kind == int(Kind.CAR)) | (agents.kind == int(Kind.TRUCK))
    # Camera and target in the frame of every possible obstacle: [S, target, obstacle].
    c, s = yaw.cos()[:, None], yaw.sin()[:, None]

    def local(wx: Tensor, wy: Tensor) -> tuple[Tensor, Tensor]:
        dx, dy = wx[:, :, None] - x[:, None], wy[:, :, None] - y[:, None]
        return c * dx + s * dy, c * dy - s * dx

    ax, ay = local(cx.expand_as(px), cy.expand_as(py))
    bx, by = local(px, py)
    enter, leave = torch.zeros_like(ax), torch.ones_like(ax)
    for a, b, half in ((ax, bx, 0.5 * agents.length), (ay, by, 0.5 * agents.width)):
        step = b - a
        step = torch.where(step.abs() < 1e-6, torch.full_like(step, 1e-6), step)
        t0, t1 = (-half[:, None] - a) / step, (half[:, None] - a) / step
        enter, leave = torch.maximum(enter, torch.minimum(t0, t1)), torch.minimum(leave, torch.maximum(t0, t1))
    # Something taller is seen above it.
    covers = blocks[:, None] & (agents.height[:, None] > agents.height[:, :, None] - 0.3)
    same = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return ((enter < leave - 0.01) & covers & ~same).any(dim=2)


def recent(sights: Sequence[Sight]) -> Sight:
    """What was seen at any time of the last `EVIDENCE_STEPS`."""
    return Sight(*(torch.stack(one[-EVIDENCE_STEPS:]).any(dim=0) for one in zip(*sights, strict=True)))


def evident(seen: Sight, cause: Tensor, actor: Tensor) -> Tensor:
    """Whether a cause (and the agent that it is about, or -1) has been seen: bool [S]."""
    someone = seen.agents.gather(1, actor.clamp(min=0)[:, None])[:, 0]
    known = torch.where(actor >= 0, someone, seen.road)
    known = torch.where(cause == int(Cause.RED_LIGHT), seen.light, known)
    return torch.where(cause == int(Cause.STOP_SIGN), seen.stop_sign, known)
