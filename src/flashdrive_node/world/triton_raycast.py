"""The loops over solids of `raycast` as Triton kernels, for compiled rendering on a GPU.

Unrolled by the compiler, 48 solids and 20 shadows per tile are hundreds of passes over the picture and minutes of
compilation; in a kernel each pixel keeps its nearest hit in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

#: Pixels per program, and numbers per solid.
_BLOCK, _FIELDS = 512, 8


@triton.jit
def _cast_kernel(
    direction, boxes, rounds, box_count, round_count, distance, slot, tiles, pixels,
    BOXES: tl.constexpr, ROUNDS: tl.constexpr, FIELDS: tl.constexpr, NEAR: tl.constexpr, FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    ray = direction + ((tile % tiles) * pixels + at) * 3
    dx = tl.load(ray, mask=inside, other=1.0)
    dy = tl.load(ray + 1, mask=inside, other=0.0)
    dz = tl.load(ray + 2, mask=inside, other=0.0)
    best = tl.full((BLOCK,), FAR, tl.float32)
    which = tl.full((BLOCK,), -1, tl.int32)
    k = 0
    count = tl.load(box_count + tile)
    while k < count:
        one = boxes + (tile.to(tl.int64) * BOXES + k) * FIELDS
        c, s = tl.load(one), tl.load(one + 1)
        enter = tl.full((BLOCK,), -FAR, tl.float32)
        leave = tl.full((BLOCK,), FAR, tl.float32)
        for axis in tl.static_range(3):
            v = c * dx + s * dy if axis == 0 else (c * dy - s * dx if axis == 1 else dz)
            inverse = 1.0 / tl.where(tl.abs(v) < 1e-6, 1e-6, v)
            o, half = tl.load(one + 2 + axis), tl.load(one + 5 + axis)
            a, b = (-half - o) * inverse, (half - o) * inverse
            enter = tl.maximum(enter, tl.minimum(a, b))
            leave = tl.minimum(leave, tl.maximum(a, b))
        nearer = (enter < leave) & (enter > NEAR) & (enter < best)
        best = tl.where(nearer, enter, best)
        which = tl.where(nearer, k, which)
        k += 1
    k = 0
    count = tl.load(round_count + tile)
    while k < count:
        one = rounds + (tile.to(tl.int64) * ROUNDS + k) * FIELDS
        c, s = tl.load(one), tl.load(one + 1)
        px, py, pz = tl.load(one + 2), tl.load(one + 3), tl.load(one + 4)
        qx = (c * dx + s * dy) / tl.load(one + 5)
        qy = (c * dy - s * dx) / tl.load(one + 6)
        qz = dz / tl.load(one + 7)
        a = qx * qx + qy * qy + qz * qz
        b = px * qx + py * qy + pz * qz
        discriminant = b * b - a * (px * px + py * py + pz * pz - 1)
        near = (-b - tl.sqrt(tl.maximum(discriminant, 0.0))) / a
        nearer = (discriminant > 0) & (near > NEAR) & (near < best)
        best = tl.where(nearer, near, best)
        which = tl.where(nearer, BOXES + k, which)
        k += 1
    out = tile.to(tl.int64) * pixels + at
    tl.store(distance + out, best, mask=inside)
    tl.store(slot + out, which, mask=inside)


@triton_op("flashdrive_world::cast", mutates_args={})
def cast_tiles(
    direction: Tensor, boxes: Tensor, rounds: Tensor, box_count: Tensor, round_count: Tensor, near: float, far: float
) -> tuple[Tensor, Tensor]:
    """The nearest of every tile's solids along every ray.

    Args:
        direction: Rays, float32 [T, P, 3].
        boxes: Per tile cosine and sine of the heading, camera position in the frame of the box, and half sizes:
            float32 [S, T, boxes, 8].
        rounds: The same for ellipsoids, with the position in units of the half sizes.
        box_count, round_count: How many of them are there, int32 [S, T].
        near, far: Hits nearer than `near` do not count; `far` is the distance of no hit, metres.

    Returns:
        Distance, float32 [S, T, P], and which of the listed solids (boxes first), int32, -1 for none.
    """
    scenes, tiles = box_count.shape
    pixels = direction.shape[1]
    distance = torch.empty((scenes, tiles, pixels), dtype=torch.float32, device=direction.device)
    slot = torch.empty((scenes, tiles, pixels), dtype=torch.int32, device=direction.device)
    grid = (scenes * tiles, triton.cdiv(pixels, _BLOCK))
    wrap_triton(_cast_kernel)[grid](
        direction, boxes, rounds, box_count, round_count, distance, slot, tiles, pixels,
        BOXES=boxes.shape[2], ROUNDS=rounds.shape[2], FIELDS=_FIELDS, NEAR=near, FAR=far, BLOCK=_BLOCK,
    )  # fmt: skip
    return distance, slot


@triton.jit
def _shadow_kernel(
    x_at, y_at, sun, boxes, rounds, box_count, round_count, sunny_at, sky_at, tiles, pixels,
    BOXES: tl.constexpr, ROUNDS: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    out = tile.to(tl.int64) * pixels + at
    x = tl.load(x_at + out, mask=inside, other=0.0)
    y = tl.load(y_at + out, mask=inside, other=0.0)
    to_sun = sun + (tile // tiles) * 3
    ux, uy, vz = tl.load(to_sun), tl.load(to_sun + 1), tl.load(to_sun + 2)
    sunny = tl.full((BLOCK,), 1.0, tl.float32)
    sky = tl.full((BLOCK,), 1.0, tl.float32)
    k = 0
    count = tl.load(box_count + tile)
    while k < count:
        one = boxes + (tile.to(tl.int64) * BOXES + k) * FIELDS
        c, s, z = tl.load(one), tl.load(one + 1), tl.load(one + 4)
        dx, dy = x - tl.load(one + 2), y - tl.load(one + 3)
        hx, hy, hz = tl.load(one + 5), tl.load(one + 6), tl.load(one + 7)
        lx, ly = c * dx + s * dy, c * dy - s * dx
        enter = tl.zeros((BLOCK,), tl.float32) + (z - hz) / vz
        leave = tl.zeros((BLOCK,), tl.float32) + (z + hz) / vz
        for axis in tl.static_range(2):
            v = c * ux + s * uy if axis == 0 else c * uy - s * ux
            v = tl.where(tl.abs(v) < 1e-4, 1e-4, v)
            p = lx if axis == 0 else ly
            h = hx if axis == 0 else hy
            a, b = (-h - p) / v, (h - p) / v
            enter = tl.maximum(enter, tl.minimum(a, b))
            leave = tl.minimum(leave, tl.maximum(a, b))
        sunny = tl.minimum(sunny, 1 - tl.minimum(tl.maximum((leave - enter) * 6.0, 0.0), 1.0))
        beside_x, beside_y = tl.maximum(tl.abs(lx) - hx, 0.0), tl.maximum(tl.abs(ly) - hy, 0.0)
        outside = tl.sqrt(beside_x * beside_x + beside_y * beside_y)
        under = 0.35 + 0.65 * tl.minimum(outside / 0.7, 1.0)
        low = ((z - hz) < 0.7) & (hx > 0.2)
        sky = tl.where(low, tl.minimum(sky, under), sky)
        k += 1
    k = 0
    count = tl.load(round_count + tile)
    while k < count:
        one = rounds + (tile.to(tl.int64) * ROUNDS + k) * FIELDS
        c, s, z = tl.load(one), tl.load(one + 1), tl.load(one + 4)
        dx, dy = x - tl.load(one + 2), y - tl.load(one + 3)
        hx, hy, hz = tl.load(one + 5), tl.load(one + 6), tl.load(one + 7)
        px, py, pz = (c * dx + s * dy) / hx, (c * dy - s * dx) / hy, -z / hz
        qx, qy, qz = (c * ux + s * uy) / hx, (c * uy - s * ux) / hy, vz / hz
        a, b = qx * qx + qy * qy + qz * qz, px * qx + py * qy + pz * qz
        margin = (b * b - a * (px * px + py * py + pz * pz - 1)) / a
        sunny = tl.minimum(sunny, 1 - tl.minimum(tl.maximum(margin * 4.0, 0.0), 1.0))
        k += 1
    tl.store(sunny_at + out, sunny, mask=inside)
    tl.store(sky_at + out, sky, mask=inside)


@triton_op("flashdrive_world::shade", mutates_args={})
def shade_tiles(
    x: Tensor, y: Tensor, sun: Tensor, boxes: Tensor, rounds: Tensor, box_count: Tensor, round_count: Tensor
) -> tuple[Tensor, Tensor]:
    """How much of sun and of sky reaches points of the ground.

    Args:
        x, y: Points, float32 [S, T, P], metres.
        sun: Unit vectors to the sun, float32 [S, 3].
        boxes: Per tile cosine and sine of the heading, centre, and half sizes: float32 [S, T, boxes, 8].
        rounds: The same for ellipsoids.
        box_count, round_count: How many of them are there, int32 [S, T].

    Returns:
        Of sun and of sky, float32 [S, T, P], in 0 .. 1.
    """
    scenes, tiles, pixels = x.shape
    x, y = x.contiguous(), y.contiguous()
    sunny, sky = torch.empty_like(x), torch.empty_like(x)
    grid = (scenes * tiles, triton.cdiv(pixels, _BLOCK))
    wrap_triton(_shadow_kernel)[grid](
        x, y, sun.contiguous(), boxes, rounds, box_count, round_count, sunny, sky, tiles, pixels,
        BOXES=boxes.shape[2], ROUNDS=rounds.shape[2], FIELDS=_FIELDS, BLOCK=_BLOCK,
    )  # fmt: skip
    return sunny, sky
