"""Rays against boxes and ellipsoids: which solid a pixel shows, and what lies in shadow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.camera import Rays
from flashdrive_node.world.solids import Solids

try:
    from flashdrive_node.world import triton_raycast
except ImportError:  # Triton comes with the GPU builds of PyTorch only
    triton_raycast = None  # type: ignore[assignment]

#: Solids of each shape that are tested per tile of an image, nearest first.
BOXES_PER_TILE, ROUNDS_PER_TILE = 26, 22
_SHADOW_BOXES, _SHADOW_ROUNDS = 12, 8
_NEAR_M = 0.2
FAR_M = 1e4


class Hit(NamedTuple):
    """What every ray meets first among the solids: [S, T, P]."""

    distance: Tensor
    #: Index into the solids.
    solid: Tensor


def nearest_per_tile(
    solids: Solids, rays: Rays, is_round: bool, reach_m: Tensor | float, count: int
) -> tuple[Tensor, Tensor]:
    """The solids that can be seen in every tile, nearest first: indices [S, T, count], and whether each is one.

    Args:
        solids: M per scene.
        rays: T tiles.
        is_round: Ellipsoids or boxes.
        reach_m: Added to their size, metres: a number or [S, M], for shadows that fall beside them.
        count: How many.
    """
    offset = solids.centre[:, :, :2] - rays.origin[:2]
    axis = rays.axis
    forward = offset[..., 0] * axis[0] + offset[..., 1] * axis[1]
    left = offset[..., 1] * axis[0] - offset[..., 0] * axis[1]
    distance = torch.sqrt(forward * forward + left * left).clamp(min=1e-3)
    radius = torch.sqrt(solids.half[..., 0] ** 2 + solids.half[..., 1] ** 2) + reach_m
    spread = torch.asin((radius / distance).clamp(max=1.0))
    spread = torch.where(distance <= radius, torch.full_like(spread, 4.0), spread)
    apart = (torch.atan2(left, forward)[:, None] - rays.tile_azimuth[None, :, None]).abs()
    there = (solids.half[..., 0] > 0) & (solids.round == is_round) & (distance - radius < 260.0)
    seen = (apart <= spread[:, None] + rays.tile_reach[None, :, None] + 1e-3) & there[:, None]
    key = torch.where(seen, (distance - radius)[:, None], torch.full_like(apart, FAR_M))
    nearest = key.topk(min(count, key.shape[2]), dim=2, largest=False)
    return nearest.indices, nearest.values < FAR_M


def cast(solids: Solids, rays: Rays) -> Hit:
    """The nearest solid along every ray."""
    if _in_kernels(solids):
        return _cast_in_kernel(solids, rays)
    scenes, tiles, pixels = solids.cos.shape[0], *rays.direction.shape[:2]
    best = torch.full((scenes, tiles, pixels), FAR_M, device=solids.cos.device)
    which = torch.zeros((scenes, tiles, pixels), dtype=torch.long, device=best.device)
    for is_round, count in ((False, BOXES_PER_TILE), (True, ROUNDS_PER_TILE)):
        listed, there = nearest_per_tile(solids, rays, is_round, 0.0, count)
        for i in range(_needed(there)):
            index = listed[:, :, i]
            one = take(solids, index)
            origin = rays.origin[None, None] - one.centre
            d = rays.direction[None]
            far = _round_distance(one, origin, d) if is_round else _box_distance(one, origin, d)
            nearer = (far < best) & there[:, :, i, None]
            best = torch.where(nearer, far, best)
            which = torch.where(nearer, index[..., None], which)
    return Hit(best, which)


def _needed(there: Tensor) -> int:
    """How many of the listed solids any tile has: [S, T, count]. A GPU would wait for the answer, so it takes all."""
    if there.device.type != "cpu" or torch.compiler.is_compiling():
        return there.shape[2]
    return int(there.sum(dim=2).max())


def _in_kernels(solids: Solids) -> bool:
    """Whether the loops over solids run as kernels: in compiled rendering on a GPU."""
    return triton_raycast is not None and solids.cos.is_cuda and torch.compiler.is_compiling()


def _cast_in_kernel(solids: Solids, rays: Rays) -> Hit:
    lists, indices = [], []
    for is_round, count in ((False, BOXES_PER_TILE), (True, ROUNDS_PER_TILE)):
        listed, there = nearest_per_tile(solids, rays, is_round, 0.0, count)
        one = take(solids, listed)
        offset = rays.origin - one.centre
        x, y, z = offset.unbind(-1)
        origin = torch.stack((one.cos * x + one.sin * y, one.cos * y - one.sin * x, z), dim=-1)
        half = one.half.clamp(min=1e-3) if is_round else one.half
        lists.append((_listed(one, origin / half if is_round else origin, half), there.sum(dim=2, dtype=torch.int32)))
        indices.append(listed)
    (boxes, box_count), (rounds, round_count) = lists
    distance, slot = triton_raycast.cast_tiles(
        rays.direction.contiguous(), boxes, rounds, box_count, round_count, _NEAR_M, FAR_M
    )
    which = torch.cat(indices, dim=2).gather(2, slot.clamp(min=0).long())
    return Hit(distance, torch.where(slot < 0, torch.zeros_like(which), which))


def _listed(one: Solids, place: Tensor, half: Tensor) -> Tensor:
    """What the kernels read of solids [S, T, K]: float32 [S, T, K, 8]."""
    return torch.cat((one.cos[..., None], one.sin[..., None], place, half), dim=-1).contiguous()


def take(solids: Solids, index: Tensor) -> Solids:
    """Solids by index [S, T] (or any [S, ...]): fields [S, T, ...]."""
    flat = index.flatten(1)

    def pick(field: Tensor) -> Tensor:
        if field.ndim == 3:
            chosen = field.gather(1, flat[..., None].expand(-1, -1, field.shape[2]))
            return chosen.reshape(*index.shape, field.shape[2])
        return field.gather(1, flat).reshape(index.shape)

    fields = {name: pick(field) for name, field in solids._asdict().items() if name != "round"}
    return Solids(**fields, round=solids.round[index])


def _box_distance(one: Solids, origin: Tensor, d: Tensor) -> Tensor:
    """Distance to a box per tile: solids [S, T], origin [S, T, 3], directions [1, T, P, 3] -> [S, T, P]."""
    c, s = one.cos[..., None], one.sin[..., None]
    ox, oy = origin[..., 0:1], origin[..., 1:2]
    local = (
        (c * ox + s * oy, c * d[..., 0] + s * d[..., 1]),
        (c * oy - s * ox, c * d[..., 1] - s * d[..., 0]),
        (origin[..., 2:3], d[..., 2]),
    )
    enter = torch.full_like(local[0][1], -FAR_M)
    leave = torch.full_like(enter, FAR_M)
    for axis, (o, v) in enumerate(local):
        inverse = 1.0 / torch.where(v.abs() < 1e-6, torch.full_like(v, 1e-6), v)
        size = one.half[..., axis : axis + 1]
        a, b = (-size - o) * inverse, (size - o) * inverse
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        enter, leave = torch.maximum(enter, low), torch.minimum(leave, high)
    hit = (enter < leave) & (enter > _NEAR_M)
    return torch.where(hit, enter, torch.full_like(enter, FAR_M))


def _round_distance(one: Solids, origin: Tensor, d: Tensor) -> Tensor:
    """Distance to an ellipsoid per tile, as `_box_distance`."""
    c, s = one.cos[..., None], one.sin[..., None]
    hx, hy, hz = (one.half[..., i : i + 1].clamp(min=1e-3) for i in range(3))
    ox, oy = origin[..., 0:1], origin[..., 1:2]
    px, py, pz = (c * ox + s * oy) / hx, (c * oy - s * ox) / hy, origin[..., 2:3] / hz
    qx, qy, qz = (c * d[..., 0] + s * d[..., 1]) / hx, (c * d[..., 1] - s * d[..., 0]) / hy, d[..., 2] / hz
    a = qx * qx + qy * qy + qz * qz
    b = px * qx + py * qy + pz * qz
    discriminant = b * b - a * (px * px + py * py + pz * pz - 1)
    near = (-b - torch.sqrt(discriminant.clamp(min=0))) / a
    hit = (discriminant > 0) & (near > _NEAR_M)
    return torch.where(hit, near, torch.full_like(near, FAR_M))


def shade_on_ground(solids: Solids, rays: Rays, x: Tensor, y: Tensor, sun: Tensor) -> tuple[Tensor, Tensor]:
    """How much of sun and of sky reaches points of the ground.

    Args:
        solids: Of the scenes.
        rays: Whose tiles the points are in.
        x, y: [S, T, P], metres.
        sun: Unit vectors to the sun [S, 3], vehicle frame.

    Returns:
        sun: 0 in shadow, 1 outside [S, T, P]; sky: below 1 under things.
    """
    sunny, open_sky = torch.ones_like(x), torch.ones_like(x)
    flat = torch.sqrt(sun[:, 0] ** 2 + sun[:, 1] ** 2) / sun[:, 2].clamp(min=0.1)
    top = solids.centre[..., 2] + solids.half[..., 2]
    reach = (top * flat[:, None]).clamp(max=25.0)
    if _in_kernels(solids):
        lists = []
        for is_round, count in ((False, _SHADOW_BOXES), (True, _SHADOW_ROUNDS)):
            listed, there = nearest_per_tile(solids, rays, is_round, reach, count)
            one = take(solids, listed)
            lists.append((_listed(one, one.centre, one.half.clamp(min=1e-3)), there.sum(dim=2, dtype=torch.int32)))
        (boxes, box_count), (rounds, round_count) = lists
        return triton_raycast.shade_tiles(x, y, sun, boxes, rounds, box_count, round_count)
    toward = sun[:, None, None, None, :].expand(-1, 1, 1, 1, -1)[:, 0]
    for is_round, count in ((False, _SHADOW_BOXES), (True, _SHADOW_ROUNDS)):
        listed, there = nearest_per_tile(solids, rays, is_round, reach, count)
        for i in range(_needed(there)):
            one, valid = take(solids, listed[:, :, i]), there[:, :, i, None]
            dx, dy = x - one.centre[..., 0:1], y - one.centre[..., 1:2]
            c, s = one.cos[..., None], one.sin[..., None]
            lx, ly = c * dx + s * dy, c * dy - s * dx
            vx = c * toward[..., 0] + s * toward[..., 1]
            vy = c * toward[..., 1] - s * toward[..., 0]
            vz = toward[..., 2].expand_as(vx)
            hx, hy, hz = (one.half[..., k : k + 1].clamp(min=1e-3) for k in range(3))
            z = one.centre[..., 2:3]
            if is_round:
                px, py, pz = lx / hx, ly / hy, -z / hz
                qx, qy, qz = vx / hx, vy / hy, vz / hz
                a, b = qx * qx + qy * qy + qz * qz, px * qx + py * qy + pz * qz
                margin = (b * b - a * (px * px + py * py + pz * pz - 1)) / a
                lit = 1 - (margin * 4.0).clamp(0, 1)
            else:
                # Where the ray to the sun enters and leaves the box, in metres along it; a thin edge is half lit.
                enter, leave = (z - hz) / vz, (z + hz) / vz
                for p, v, h in ((lx, vx, hx), (ly, vy, hy)):
                    v = torch.where(v.abs() < 1e-4, torch.full_like(v, 1e-4), v)
                    a, b = (-h - p) / v, (h - p) / v
                    enter = torch.maximum(enter, torch.minimum(a, b))
                    leave = torch.minimum(leave, torch.maximum(a, b))
                lit = 1 - ((leave - enter) * 6.0).clamp(0, 1)
                outside = torch.sqrt(((lx.abs() - hx).clamp(min=0)) ** 2 + ((ly.abs() - hy).clamp(min=0)) ** 2)
                low = valid & ((z - hz) < 0.7) & (hx > 0.2)
                under = 0.35 + 0.65 * (outside / 0.7).clamp(0, 1)
                open_sky = torch.where(low, torch.minimum(open_sky, under), open_sky)
            sunny = torch.where(valid, torch.minimum(sunny, lit), sunny)
    return sunny, open_sky
