"""Everything that stands above the ground as boxes and ellipsoids, in the vehicle frame."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.scene import LANE_M, Control, Kind, Scene
from flashdrive_node.world.state import State, agent_poses


class Pixel(IntEnum):
    """What a pixel shows."""

    SKY = 0
    GROUND = 1
    ROAD = 2
    MARKING = 3
    STATIC = 4
    CAR = 5
    TRUCK = 6
    CYCLIST = 7
    PEDESTRIAN = 8
    CONE = 9
    RED_LIGHT = 10
    YELLOW_LIGHT = 11
    GREEN_LIGHT = 12
    STOP_SIGN = 13


class Finish(IntEnum):
    """How the surface of a solid is painted."""

    PLAIN = 0
    BODY = 1
    CABIN = 2
    CARGO = 3
    WINDOWS = 4
    LAMPS = 5
    SIGN = 6
    BANDED = 7
    CLOTHED = 8
    LEAVES = 9


class Solids(NamedTuple):
    """M solids of S scenes, float32."""

    #: Middle [S, M, 3], metres, vehicle frame.
    centre: Tensor
    #: Cosine and sine of the heading [S, M], from double precision so that every device has the same.
    cos: Tensor
    sin: Tensor
    #: Half extents along the own axes [S, M, 3], metres; zero for what is not there.
    half: Tensor
    #: [S, M, 3], linear RGB.
    colour: Tensor
    #: `Pixel`, `Finish` [S, M] int64, and whether it is an ellipsoid [M] (the same in all scenes).
    pixel: Tensor
    finish: Tensor
    #: What a finish needs: braking for bodies, the `Light` for lamps [S, M].
    signal: Tensor
    round: Tensor


_PAINTS = (
    (0.62, 0.63, 0.65), (0.80, 0.80, 0.80), (0.05, 0.05, 0.06), (0.16, 0.17, 0.19), (0.42, 0.03, 0.03),
    (0.04, 0.10, 0.32), (0.30, 0.31, 0.33), (0.10, 0.22, 0.14), (0.45, 0.36, 0.22), (0.70, 0.70, 0.68),
)  # fmt: skip
_CLOTHES = ((0.55, 0.08, 0.08), (0.08, 0.16, 0.45), (0.62, 0.60, 0.20), (0.10, 0.35, 0.16), (0.6, 0.6, 0.6))
_WALLS = ((0.36, 0.20, 0.14), (0.48, 0.43, 0.34), (0.40, 0.40, 0.42), (0.52, 0.47, 0.42), (0.26, 0.26, 0.30))
_BARK, _LEAF, _METAL, _ORANGE = (0.12, 0.08, 0.05), (0.075, 0.16, 0.045), (0.16, 0.17, 0.18), (0.85, 0.22, 0.03)


class _Pile:
    """Collects solids as columns."""

    def __init__(self, scene: Scene, state: State):
        self.scene, self.state = scene, state
        self.columns: list[tuple[Tensor, ...]] = []
        self.round: list[bool] = []
        self.cos, self.sin = state.yaw.cos()[:, None], state.yaw.sin()[:, None]

    def add(
        self, x: Tensor, y: Tensor, yaw: Tensor, z: Tensor | float, half: tuple, colour: Tensor, pixel: Tensor | int,
        finish: Tensor | int = 0, signal: Tensor | int = 0, is_round: bool = False, where: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add N solids per scene: world x, y, yaw [S, N], height of the middle, three half extents, colour [.., 3]."""

        def full(value: Tensor | float) -> Tensor:
            return torch.as_tensor(value, device=x.device).to(x.dtype).expand(x.shape)

        dx, dy = x - self.state.x[:, None], y - self.state.y[:, None]
        centre = torch.stack((self.cos * dx + self.sin * dy, self.cos * dy - self.sin * dx, full(z)), dim=2)
        halves = torch.stack([full(h) for h in half], dim=2)
        if where is not None:
            halves = torch.where(where[:, :, None], halves, torch.zeros_like(halves))
        colour = colour.to(x.dtype).expand(*x.shape, 3)
        turned = yaw - self.state.yaw[:, None]
        self.columns.append(
            (centre, turned.cos(), turned.sin(), halves, colour, full(pixel), full(finish), full(signal))
        )
        self.round += [is_round] * x.shape[1]

    def solids(self) -> Solids:
        """All that were added."""
        columns = [torch.cat(column, dim=1).float() for column in zip(*self.columns, strict=True)]
        centre, cos, sin, half, colour, pixel, finish, signal = columns
        is_round = torch.tensor(self.round, device=cos.device)
        return Solids(centre, cos, sin, half, colour, pixel.long(), finish.long(), signal, is_round)


def build_solids(scene: Scene, state: State) -> Solids:
    """All solids of a moment."""
    pile = _Pile(scene, state)
    _vehicles(pile)
    _people(pile)
    _roadside(pile)
    _lights_and_signs(pile)
    return pile.solids()


def _table(rows: tuple, like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def _vehicles(pile: _Pile) -> None:
    scene, state = pile.scene, pile.state
    agents = scene.agents
    x, y, yaw = agent_poses(scene, state)
    paint = _table(_PAINTS, x)[agents.paint % len(_PAINTS)]
    car, truck = agents.kind == int(Kind.CAR), agents.kind == int(Kind.TRUCK)
    # Brake lights are on while slowing down and while standing in traffic.
    slowing = (state.agent_accel < -0.5) | (state.agent_speed < 0.3)
    signal = (slowing & (agents.direction != 0)).long()
    length, w, h = agents.length, agents.width, agents.height
    pixel = torch.where(truck, int(Pixel.TRUCK), int(Pixel.CAR))

    def shifted(by: Tensor) -> tuple[Tensor, Tensor]:
        return x + by * yaw.cos(), y + by * yaw.sin()

    # Car: body and cabin. Truck: cargo and driver's cab.
    back = torch.where(truck, -0.12 * length, torch.zeros_like(length))
    half_l = torch.where(truck, 0.38 * length, 0.5 * length)
    low, high = torch.where(truck, 0.55, 0.28), torch.where(truck, h, 0.62 * h)
    finish = torch.where(truck, int(Finish.CARGO), int(Finish.BODY))
    cargo = torch.where(truck[:, :, None], paint * 0.4 + 0.4, paint)
    half = (half_l, 0.5 * w, 0.5 * (high - low))
    pile.add(*shifted(back), yaw, 0.5 * (low + high), half, cargo, pixel, finish, signal, where=car | truck)
    back = torch.where(truck, 0.39 * length, -0.05 * length)
    half_l = torch.where(truck, 0.11 * length, 0.29 * length)
    low, high = torch.where(truck, 0.4, 0.62 * h), torch.where(truck, 0.8 * h, h)
    half = (half_l, torch.where(truck, 0.48 * w, 0.43 * w), 0.5 * (high - low))
    pile.add(*shifted(back), yaw, 0.5 * (low + high), half, paint, pixel, int(Finish.CABIN), where=car | truck)
    cone = agents.kind == int(Kind.CONE)
    orange, black = _table(_ORANGE, x), _table((0.03, 0.03, 0.03), x)
    pile.add(x, y, yaw, 0.03, (0.22, 0.22, 0.03), black, int(Pixel.CONE), where=cone)
    pile.add(
        x, y, yaw, 0.35, (0.15, 0.15, 0.42), orange, int(Pixel.CONE), int(Finish.BANDED), is_round=True, where=cone
    )


def _people(pile: _Pile) -> None:
    scene = pile.scene
    agents = scene.agents
    x, y, yaw = agent_poses(scene, pile.state)
    clothes = _table(_CLOTHES, x)[agents.paint % len(_CLOTHES)]
    skin = _table((0.50, 0.32, 0.24), x)
    rides = agents.kind == int(Kind.CYCLIST)
    person = rides | (agents.kind == int(Kind.PEDESTRIAN))
    pixel = torch.where(rides, int(Pixel.CYCLIST), int(Pixel.PEDESTRIAN))
    middle, tall = torch.where(rides, 1.15, 0.80), torch.where(rides, 0.50, 0.80)
    half = (torch.where(rides, 0.30, 0.22), 0.26, tall)
    pile.add(x, y, yaw, middle, half, clothes, pixel, int(Finish.CLOTHED), is_round=True, where=person)
    pile.add(x, y, yaw, 1.66, (0.12, 0.11, 0.14), skin, pixel, is_round=True, where=person)
    frame = _table((0.06, 0.06, 0.07), x)
    pile.add(x, y, yaw, 0.45, (0.85, 0.04, 0.32), frame, int(Pixel.CYCLIST), where=rides)


def _roadside(pile: _Pile) -> None:
    scene, props = pile.scene, pile.scene.props
    x, y, yaw = scene.road.pose_at(props.s, props.d)
    tree, building, lamp = (props.kind == k for k in (1, 2, 3))
    height = props.height
    static = int(Pixel.STATIC)
    thin = torch.where(lamp, 0.07, 0.16)
    tall = torch.where(tree, 0.25 * height, 0.5 * height)
    colour = torch.where(tree[:, :, None], _table(_BARK, x), _table(_METAL, x))
    pile.add(x, y, yaw, tall, (thin, thin, tall), colour, static, where=tree | lamp)
    shade = (0.75 + 0.5 * (props.paint.to(x.dtype) / 255))[:, :, None]
    leaf = _table(_LEAF, x) * shade
    crown = (props.size, props.size, 0.30 * height)
    pile.add(x, y, yaw, 0.68 * height, crown, leaf, static, int(Finish.LEAVES), is_round=True, where=tree)
    walls = _table(_WALLS, x)[props.paint % len(_WALLS)]
    half = (props.size, props.size * 0.9, 0.5 * height)
    pile.add(x, y, yaw, 0.5 * height, half, walls, static, int(Finish.WINDOWS), where=building)


def _lights_and_signs(pile: _Pile) -> None:
    scene, state = pile.scene, pile.state
    lit = (scene.control == int(Control.LIGHT))[:, None]
    signed = (scene.control == int(Control.STOP_SIGN))[:, None]
    right = -(LANE_M * (scene.lanes_right + 0.5) + scene.shoulder + 0.7)[:, None]
    left = (LANE_M * (scene.lanes_left + 0.5) + 0.0)[:, None]
    near, far = scene.stop_line_s[:, None] + 1.0, (scene.junction_s + 5.5)[:, None]
    metal, dark = _table(_METAL, state.x), _table((0.02, 0.02, 0.02), state.x)
    light = scene.light(state.time_s)[:, None]
    pixel = int(Pixel.RED_LIGHT) + 2 - light  # Light.RED is 2, Light.GREEN is 0
    # One light beside the stop line, one hanging over the lane behind the junction.
    for s, d, z in ((near, right, 2.7), (far, torch.zeros_like(left), 5.4)):
        x, y, yaw = scene.road.pose_at(s, d)
        pile.add(x, y, yaw, z, (0.14, 0.2, 0.55), dark, pixel, int(Finish.LAMPS), light, where=lit)
    x, y, yaw = scene.road.pose_at(near, right)
    pile.add(x, y, yaw, 1.1, (0.06, 0.06, 1.1), metal, int(Pixel.STATIC), where=lit | signed)
    red = _table((0.60, 0.02, 0.03), state.x)
    x, y, _ = scene.road.pose_at(near - 0.1, right)
    half = (0.03, 0.40, 0.40)
    pile.add(x, y, yaw, 2.3, half, red, int(Pixel.STOP_SIGN), int(Finish.SIGN), is_round=True, where=signed)
    # The mast of the light over the road.
    x, y, yaw = scene.road.pose_at(far + 0.2, right)
    pile.add(x, y, yaw, 3.0, (0.09, 0.09, 3.0), metal, int(Pixel.STATIC), where=lit)
    x, y, yaw = scene.road.pose_at(far + 0.2, 0.5 * right)
    pile.add(x, y, yaw, 6.0, (0.06, (0.5 * right).abs() + 0.3, 0.06), metal, int(Pixel.STATIC), where=lit)
