"""What the ground looks like: asphalt, markings, crossings, pavements and grass, smooth at any distance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.road import local_coordinates
from flashdrive_node.world.scene import CROSSWALK_M, LANE_M, NOWHERE_M, Scene
from flashdrive_node.world.solids import Pixel
from flashdrive_node.world.state import State

_ASPHALT, _WHITE, _YELLOW = (0.085, 0.085, 0.09), (0.62, 0.62, 0.60), (0.58, 0.40, 0.05)
_PAVEMENT, _KERB, _GRASS, _SOIL = (0.26, 0.25, 0.235), (0.36, 0.355, 0.34), (0.085, 0.155, 0.045), (0.15, 0.13, 0.075)
#: Half of the width of a marking, and the dashes: length and period, metres.
_STRIPE_M, _DASH_M, _PERIOD_M = 0.075, 4.0, 9.0
_CROSS_HALF_M = LANE_M + 0.4


class GroundPoints(NamedTuple):
    """Points of the ground that pixels show: [S, T, P] each."""

    #: Vehicle frame, metres.
    x: Tensor
    y: Tensor
    #: Size of the pixel on the ground across and along the line of sight, metres.
    across_m: Tensor
    along_m: Tensor
    #: Horizontal direction of sight, unit length.
    look_x: Tensor
    look_y: Tensor


class _Coordinates(NamedTuple):
    s: Tensor
    d: Tensor
    #: Size of the pixel along s and d.
    s_size: Tensor
    d_size: Tensor


def paint_ground(scene: Scene, state: State, points: GroundPoints) -> tuple[Tensor, Tensor]:
    """Colour (linear RGB) [S, T, P, 3] and `Pixel` [S, T, P] of the ground."""
    route = _on_route(scene, state, points)
    straight = _on_straight(scene, state, points)
    junction = _per_scene(scene.junction_s)
    turning = (_per_scene(scene.turn) != 0).expand_as(route.d)
    from_crossing = straight.s - junction
    crossed = junction < 0.5 * NOWHERE_M
    left_edge = _per_scene(scene.left_edge)
    right_edge = scene.right_edge(route.s.flatten(1).double()).reshape(route.s.shape).float()

    # Distance into the asphalt (negative outside) of the three strips that there may be.
    inside = torch.minimum(route.d - right_edge, left_edge - route.d)
    across = _CROSS_HALF_M - from_crossing.abs()
    onward = torch.minimum(straight.d - right_edge, left_edge - straight.d)
    inside = torch.where(crossed, torch.maximum(inside, across), inside)
    inside = torch.where(turning, torch.maximum(inside, onward), inside)
    size = torch.minimum(route.d_size, points.along_m).clamp(min=0.01)

    noise = _noise(scene, state, points)
    colour = _mix(_flat(_GRASS, noise), _flat(_SOIL, noise), (noise[1] * 1.5 - 0.6).clamp(0, 1))
    colour = colour * (0.75 + 0.5 * noise[0])[..., None]
    colour = _mix(colour, _flat(_PAVEMENT, noise) * (0.94 + 0.12 * noise[0])[..., None], _above(inside, -2.6, size))
    colour = _mix(colour, _flat(_KERB, noise), _above(inside, -0.22, size))
    road = _above(inside, 0.0, size)
    asphalt = _flat(_ASPHALT, noise) * (0.80 + 0.25 * noise[0] + 0.2 * noise[1])[..., None]
    colour = _mix(colour, asphalt, road)

    box = crossed & (from_crossing.abs() < _CROSS_HALF_M + 0.6)
    near_turn = turning & (route.s > _per_scene(scene.turn_s) - 1.0) & (route.s < _per_scene(scene.turn_s) + 18.0)
    on_route = ~near_turn & ~(box & ~turning)
    lines = _lane_lines(scene, route, right_edge)
    white, yellow = lines[0] * on_route, lines[1] * on_route
    beyond = turning & (from_crossing > _CROSS_HALF_M + 1.0)
    lines = _lane_lines(scene, straight, right_edge)
    white, yellow = torch.maximum(white, lines[0] * beyond), torch.maximum(yellow, lines[1] * beyond)
    arms = crossed & ((straight.d > left_edge + 1.5) | (straight.d < right_edge - 1.5))
    yellow = torch.maximum(yellow, _stripe(from_crossing, 0.1, straight.s_size) * arms)
    white = torch.maximum(white, _stripe(from_crossing.abs() - LANE_M + 0.1, _STRIPE_M, straight.s_size) * arms)

    line = _per_scene(scene.stop_line_s) + 0.35
    own = torch.minimum(straight.d - right_edge - 0.3, LANE_M * (_per_scene(scene.lanes_left) + 0.5) - 0.1 - straight.d)
    white = torch.maximum(white, _stripe(straight.s - line, 0.22, straight.s_size) * _above(own, 0.0, straight.d_size))
    zebra = _stripe(straight.s - _per_scene(scene.crosswalk_s), 0.5 * CROSSWALK_M, straight.s_size)
    white = torch.maximum(white, zebra * _bars(straight.d, 0.45, 1.0, straight.d_size) * road)
    bump = _stripe(route.s - _per_scene(scene.bump_s) - 0.8, 0.8, route.s_size) * road
    bars = _bars(route.d + 0.6 * route.s, 0.6, 1.2, torch.maximum(route.d_size, route.s_size))
    colour = _mix(colour, _flat(_SOIL, noise) * 0.35, bump)
    yellow = torch.maximum(yellow, bump * bars)
    # Paint wears off.
    worn = 0.82 + 0.18 * noise[1]
    colour = _mix(colour, _flat(_YELLOW, noise), yellow * worn)
    colour = _mix(colour, _flat(_WHITE, noise), white * worn)
    pixel = torch.where(road > 0.5, int(Pixel.ROAD), int(Pixel.GROUND))
    pixel = torch.where(torch.maximum(white, yellow) > 0.4, int(Pixel.MARKING), pixel)
    return colour, pixel


def _per_scene(value: Tensor) -> Tensor:
    """[S] -> [S, 1, 1] float32."""
    return value.float()[:, None, None]


def rgb_like(like: Tensor, rgb: tuple[float, ...]) -> Tensor:
    """A colour [3] beside a tensor, filled on its device: a copy from the host would make the device wait."""
    return torch.stack([like.new_full((), value) for value in rgb])


def _flat(colour: tuple[float, float, float], noise: tuple[Tensor, Tensor]) -> Tensor:
    return rgb_like(noise[0], colour)


def _mix(under: Tensor, over: Tensor, share: Tensor) -> Tensor:
    return under + (over - under) * share[..., None]


def _above(value: Tensor, limit: float, size: Tensor) -> Tensor:
    """Share of a pixel of this size in which value > limit."""
    return ((value - limit) / size + 0.5).clamp(0, 1)


def _stripe(offset: Tensor, half: float, size: Tensor) -> Tensor:
    """Share of a pixel that a stripe of this half width covers, offset from the pixel's middle."""
    return torch.minimum(((half - offset.abs()) / size + 0.5).clamp(0, 1), (2 * half / size).clamp(max=1.0))


def _bars(offset: Tensor, width: float, period: float, size: Tensor) -> Tensor:
    """Share of a pixel that bars of a width and period cover."""
    phase = (offset / period) - torch.floor(offset / period)
    near = _stripe((phase - 0.5) * period, 0.5 * width, size)
    blur = (size / period).clamp(0, 1)
    return near * (1 - blur) + (width / period) * blur


def _on_route(scene: Scene, state: State, points: GroundPoints) -> _Coordinates:
    """Coordinates along the ego's road."""
    road = scene.road
    cos, sin = state.yaw.cos(), state.yaw.sin()
    dx, dy = road.x - state.x[:, None], road.y - state.y[:, None]
    px = (cos[:, None] * dx + sin[:, None] * dy).float()
    py = (cos[:, None] * dy - sin[:, None] * dx).float()
    turned = road.yaw - state.yaw[:, None]
    pc, ps = turned.cos().float(), turned.sin().float()
    first = (road.knots[:, :-1] - state.s[:, None]).float()
    length = (road.knots[:, 1:] - road.knots[:, :-1]).float()
    bends = road.curvature.float()
    best: list[Tensor] = []
    for i in range(px.shape[1]):

        def at(value: Tensor, i: int = i) -> Tensor:
            return value[:, i, None, None]

        forward = at(pc) * (points.x - at(px)) + at(ps) * (points.y - at(py))
        left = at(pc) * (points.y - at(py)) - at(ps) * (points.x - at(px))
        s, d = local_coordinates(forward, left, at(bends).expand_as(forward))
        outside = s - torch.minimum(s.clamp(min=0), at(length).expand_as(s))
        cost = d.abs() + outside.abs()
        yaw = at(turned.float()) + at(bends) * s
        values = [cost, s + at(first), d, yaw]
        if best:
            nearer = cost < best[0]
            best = [torch.where(nearer, new, old) for new, old in zip(values, best, strict=True)]
        else:
            best = values
    _, s, d, yaw = best
    c, si = yaw.cos(), yaw.sin()
    return _Coordinates(s + _per_scene(state.s), d, *_sizes(points, c, si))


def _sizes(points: GroundPoints, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Size of the pixels along and across a road that heads along (c, s)."""
    along = (points.look_x * c + points.look_y * s).abs()
    across = (points.look_y * c - points.look_x * s).abs()
    return along * points.along_m + across * points.across_m, across * points.along_m + along * points.across_m


def _on_straight(scene: Scene, state: State, points: GroundPoints) -> _Coordinates:
    """Coordinates in the straight frame of the junction."""
    x0, y0, yaw0, s0 = scene.junction_frame.unbind(1)
    turn = state.yaw - yaw0
    c, s = turn.cos(), turn.sin()
    ex, ey = state.x - x0, state.y - y0
    along = _per_scene(s0 + yaw0.cos() * ex + yaw0.sin() * ey)
    aside = _per_scene(yaw0.cos() * ey - yaw0.sin() * ex)
    c, s = _per_scene(c), _per_scene(s)
    # The frame's x axis in the vehicle frame is (c, -s).
    sizes = _sizes(points, c, -s)
    return _Coordinates(along + c * points.x - s * points.y, aside + s * points.x + c * points.y, *sizes)


def _lane_lines(scene: Scene, at: _Coordinates, right_edge: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage by white and by yellow lines along the road."""
    left, right = _per_scene(scene.lanes_left), _per_scene(scene.lanes_right)
    last = left + _per_scene(scene.lanes_oncoming)
    boundary = torch.round(at.d / LANE_M - 0.5)
    offset = at.d - (boundary + 0.5) * LANE_M
    line = _stripe(offset, _STRIPE_M, at.d_size)
    dashes = _bars(at.s, _DASH_M, _PERIOD_M, at.s_size)
    solid = (boundary == last) | (boundary == -right - 1)
    # Where a lane ends, its edge line follows the asphalt and the dashes stop.
    ending = (_per_scene(scene.merge_s) < 0.5 * NOWHERE_M) & (at.s > _per_scene(scene.merge_s) - 41.0)
    white = torch.where(solid & ~ending | (boundary == last), line, line * dashes)
    within = (boundary >= -right - 1) & (boundary <= last) & (boundary != left)
    within = within & ~(ending & (boundary <= 0) & (at.s > _per_scene(scene.merge_s) - 20.0))
    edge = _stripe(at.d - right_edge - 0.5, _STRIPE_M, at.d_size) * ending
    double = torch.maximum(_stripe(offset - 0.14, _STRIPE_M, at.d_size), _stripe(offset + 0.14, _STRIPE_M, at.d_size))
    return torch.maximum(white * within, edge), double * (boundary == left)


def _noise(scene: Scene, state: State, points: GroundPoints) -> tuple[Tensor, Tensor]:
    """Fine and coarse value noise fixed to the world, in 0 .. 1, faded where a pixel spans it."""
    c, s = _per_scene(state.yaw.cos()), _per_scene(state.yaw.sin())
    x = c * points.x - s * points.y + _per_scene(state.x)
    y = s * points.x + c * points.y + _per_scene(state.y)
    seed = scene.key[:, None, None]
    results = []
    for cell in (0.3, 3.0):
        value = value_noise(x / cell, y / cell, seed)
        fade = (1.5 - points.along_m / cell).clamp(0, 1)
        results.append(0.5 + (value - 0.5) * fade)
    return results[0], results[1]


def value_noise(x: Tensor, y: Tensor, seed: Tensor) -> Tensor:
    """Random values at integer points, bilinear between them; from integer hashes, the same on every device."""
    x, y = x.clamp(-1e6, 1e6), y.clamp(-1e6, 1e6)
    fx, fy = torch.floor(x), torch.floor(y)
    ix, iy = fx.long(), fy.long()
    ax, ay = x - fx, y - fy

    def corner(i: int, j: int) -> Tensor:
        h = (((ix + i) * 374761393 + (iy + j) * 668265263 + seed * 974634077) & 0xFFFFFFFF) ^ 0x5BD1E995
        h = ((h ^ (h >> 15)) * 1274126177) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 1103515245) & 0xFFFFFFFF
        return ((h >> 16) & 0xFFFF).float() / 65535.0

    low = corner(0, 0) + (corner(1, 0) - corner(0, 0)) * ax
    high = corner(0, 1) + (corner(1, 1) - corner(0, 1)) * ax
    return low + (high - low) * ay
