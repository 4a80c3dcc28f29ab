"""The world from above: ground, vehicles and lights around the ego, in the vehicle frame."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from flashdrive_node.world.ground import GroundPoints, paint_ground
from flashdrive_node.world.scene import Control, Kind, Light, Scene
from flashdrive_node.world.state import State, agent_poses

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]

#: RGB by kind of agent, and of the lights.
_COLORS = {
    Kind.CAR: (232, 232, 236),
    Kind.TRUCK: (196, 204, 222),
    Kind.CYCLIST: (255, 170, 190),
    Kind.PEDESTRIAN: (255, 120, 150),
    Kind.CONE: (255, 150, 60),
}
_LIGHTS = {Light.GREEN: (60, 220, 110), Light.YELLOW: (250, 205, 60), Light.RED: (245, 70, 60)}
#: How much of the ground's light is shown, so that what is drawn onto it stands out.
_BRIGHTNESS = 1.3
#: Pixels of the ground that is painted, per pixel of the picture and side.
_COARSENESS = 2
_SHIFT = 4


@dataclass(frozen=True)
class PlanFrame:
    """What of the vehicle frame a plan view shows, ahead upwards."""

    width: int
    height: int
    ahead_m: float = 60.0
    behind_m: float = 12.0

    @property
    def scale(self) -> float:
        """Pixels per metre."""
        return self.height / (self.ahead_m + self.behind_m)

    def pixels(self, xy: Array) -> Array:
        """Column and row [N, 2] of points [N, 2] in the vehicle frame, metres."""
        return np.stack((self.width / 2 - xy[:, 1] * self.scale, (self.ahead_m - xy[:, 0]) * self.scale), axis=1)


def plan_view(scene: Scene, state: State, frame: PlanFrame) -> Picture:
    """One scene from above, at one moment, without the ego: RGB uint8 [height, width, 3].

    Args:
        scene, state: One scene.
        frame: What is shown.
    """
    view = _ground(scene, state, frame)
    _draw_agents(view, scene, state, frame)
    _draw_light(view, scene, state, frame)
    return view


@torch.no_grad()
def _ground(scene: Scene, state: State, frame: PlanFrame) -> Picture:
    rows, columns = frame.height // _COARSENESS, frame.width // _COARSENESS
    size = _COARSENESS / frame.scale
    x = frame.ahead_m - (torch.arange(rows) + 0.5) * size
    y = (columns / 2 - torch.arange(columns) - 0.5) * size
    x, y = (t[None] for t in torch.meshgrid(x, y, indexing="ij"))
    flat = torch.full_like(x, size)
    points = GroundPoints(x, y, flat, flat, torch.ones_like(x), torch.zeros_like(x))
    colour, _ = paint_ground(scene, state, points)
    picture = (colour[0] * _BRIGHTNESS).clamp(0, 1) ** (1 / 2.2) * 255
    whole = cv2.resize(picture.numpy(), (frame.width, frame.height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(whole, np.uint8)


def _draw_agents(view: Picture, scene: Scene, state: State, frame: PlanFrame) -> None:
    agents = scene.agents
    x, y, yaw = (v[0].cpu().numpy() for v in agent_poses(scene, state))
    here = np.array([float(state.x[0]), float(state.y[0])])
    heading = float(state.yaw[0])
    for i, kind in enumerate(agents.kind[0].tolist()):
        if kind == Kind.NOTHING:
            continue
        half = np.array([float(agents.length[0, i]), float(agents.width[0, i])]) / 2
        # A pedestrian or a cone seen from above would be a dot.
        half = np.maximum(half, 0.45)
        corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * half @ _turn(yaw[i] - heading).T
        middle = (np.array([x[i], y[i]]) - here) @ _turn(heading)
        box = _fixed(frame.pixels(corners + middle))
        cv2.fillPoly(view, [box], _COLORS[Kind(kind)], cv2.LINE_AA, _SHIFT)
        cv2.polylines(view, [box], True, (20, 22, 26), 1, cv2.LINE_AA, _SHIFT)


def _draw_light(view: Picture, scene: Scene, state: State, frame: PlanFrame) -> None:
    """The traffic light as a bar along the stop line."""
    if int(scene.control[0]) != Control.LIGHT:
        return
    s = scene.stop_line_s[:, None].expand(1, 2)
    x, y, _ = scene.road.pose_at(s, torch.tensor([[-1.6, 1.6]], dtype=s.dtype))
    world = torch.stack((x[0] - state.x[0], y[0] - state.y[0]), dim=1).numpy()
    ends = _fixed(frame.pixels(world @ _turn(float(state.yaw[0]))))
    colour = _LIGHTS[Light(int(scene.light(state.time_s)[0]))]
    cv2.line(view, ends[0].tolist(), ends[1].tolist(), colour, 6, cv2.LINE_AA, _SHIFT)


def _turn(angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s], [s, c]])


def _fixed(pixels: Array) -> NDArray[np.int32]:
    return np.round(np.clip(pixels, -4000, 8000) * (1 << _SHIFT)).astype(np.int32)
