"""How the surfaces of solids are painted: windows, lamps, wheels, clothes."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.world.camera import Rays
from flashdrive_node.world.ground import rgb_like, value_noise
from flashdrive_node.world.raycast import Hit, take
from flashdrive_node.world.solids import Finish, Pixel, Solids

_GLASS, _TYRE, _PLATE = (0.025, 0.03, 0.035), (0.012, 0.012, 0.013), (0.5, 0.5, 0.48)
_LAMP_RED, _HEADLAMP = (0.30, 0.012, 0.012), (0.55, 0.55, 0.52)
#: Colours of the three lamps of a traffic light, green first as in `Light`.
_SIGNALS = ((0.02, 0.95, 0.35), (1.0, 0.62, 0.04), (1.0, 0.03, 0.02))


def paint_solids(solids: Solids, hit: Hit, rays: Rays, night: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Surfaces where rays meet solids.

    Args:
        solids: M per scene.
        hit: What the rays meet [S, T, P]; where nothing, the result means nothing.
        rays: The rays.
        night: [S], 1 at night.

    Returns:
        Colour (linear RGB) [S, T, P, 3], outward normal [S, T, P, 3] in the vehicle frame, light that the surface gives
        off itself [S, T, P, 3], and `Pixel` [S, T, P].
    """
    one = take(solids, hit.solid)
    half = one.half.clamp(min=1e-3)
    offset = rays.origin + hit.distance.clamp(max=1e3)[..., None] * rays.direction[None] - one.centre
    c, s = one.cos, one.sin
    local = torch.stack(
        (c * offset[..., 0] + s * offset[..., 1], c * offset[..., 1] - s * offset[..., 0], offset[..., 2]), -1
    )
    u = local / half
    face = u.abs().argmax(dim=-1)
    boxy = torch.stack([(face == axis).to(u.dtype) for axis in range(3)], dim=-1) * u.sign()
    n = torch.where(one.round[..., None], u / half, boxy)
    n = n / n.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    normal = torch.stack((c * n[..., 0] - s * n[..., 1], s * n[..., 0] + c * n[..., 1], n[..., 2]), dim=-1)

    colour, glow = one.colour, torch.zeros_like(one.colour)
    ux, uy, uz = u.unbind(-1)
    lx, ly, lz = local.unbind(-1)
    rear, front = (face == 0) & (ux < 0), (face == 0) & (ux > 0)
    side, top = face == 1, face == 2

    wheel_z = lz + half[..., 2]
    body, cargo = (one.finish == int(Finish.BODY)), (one.finish == int(Finish.CARGO))
    wheel = ((ux.abs() - 0.62) * half[..., 0]) ** 2 + (wheel_z - 0.05) ** 2 < 0.31**2
    colour = _put(colour, body & side & wheel, _TYRE)
    colour = _put(colour, cargo & (uz < -0.86), _TYRE)
    low = torch.where(cargo, uz + 0.62, uz - 0.40).abs() < torch.where(cargo, 0.10, 0.28)
    lamps = (body | cargo) & low & (uy.abs() > 0.66)
    colour = _put(colour, rear & lamps, _LAMP_RED)
    braking = one.signal > 0.5
    dark = (night > 0.5)[:, None, None]
    glow = _put(glow, rear & lamps & dark, (0.35, 0.01, 0.01))
    glow = _put(glow, rear & lamps & braking, (0.95, 0.04, 0.03))
    colour = _put(colour, front & lamps, _HEADLAMP)
    glow = _put(glow, front & lamps & dark, (1.0, 0.95, 0.8))
    colour = _put(
        colour,
        (body | cargo) & rear & (uy.abs() < 0.22) & (torch.where(cargo, uz + 0.75, uz + 0.25).abs() < 0.14),
        _PLATE,
    )
    colour = _put(colour, body & (uz < -0.55) & ~side & ~top, _TYRE)
    sill = torch.where(one.pixel == int(Pixel.TRUCK), 0.15, -0.8)
    colour = _put(
        colour, (one.finish == int(Finish.CABIN)) & ~top & (uz > sill) & (uz < 0.8) & (side | (uy.abs() < 0.94)), _GLASS
    )

    along = torch.where(side, lx, ly) + 50.0
    column, storey = along / 2.6, (lz + half[..., 2]) / 3.1
    fx, fz = column - torch.floor(column), storey - torch.floor(storey)
    # Edges as wide as a pixel: windows smaller than that melt into the wall instead of flickering.
    size = (hit.distance * rays.pixel_angle).clamp(min=0.02)
    pane = ((0.27 - (fx - 0.5).abs()) * 2.6 / size + 0.5).clamp(0, 1)
    pane = pane * ((0.25 - (fz - 0.55).abs()) * 3.1 / size + 0.5).clamp(0, 1)
    pane = (pane * ((one.finish == int(Finish.WINDOWS)) & ~top & (uz < 0.92)))[..., None]
    wall = colour
    colour = wall + (rgb_like(u, (0.06, 0.075, 0.095)) - wall) * pane
    lit = value_noise(torch.floor(column) * 1.0, torch.floor(storey) * 1.0, hit.solid) > 0.55
    glow = glow + pane * (lit & dark)[..., None] * rgb_like(u, (0.42, 0.30, 0.12))

    lamp = one.finish == int(Finish.LAMPS)
    for state, rgb in enumerate(_SIGNALS):
        centre = (state - 1) * 0.66
        disc = lamp & rear & (((uz - centre) * half[..., 2]) ** 2 + ly**2 < 0.145**2)
        colour = _put(colour, disc, (0.06 * rgb[0], 0.06 * rgb[1], 0.06 * rgb[2]))
        glow = _put(glow, disc & (one.signal.round() == state), rgb)

    sign = one.finish == int(Finish.SIGN)
    rim = (uy * uy + uz * uz) > 0.80
    letter = (uy + 0.72) / 0.36
    letters = (uz.abs() < 0.24) & (uy.abs() < 0.72) & ((letter - torch.floor(letter) - 0.5).abs() < 0.33)
    colour = _put(colour, sign & (rim | letters), (0.7, 0.7, 0.7))
    colour = _put(colour, (one.finish == int(Finish.BANDED)) & (uz > 0.05) & (uz < 0.45), (0.75, 0.75, 0.75))
    colour = _put(colour, (one.finish == int(Finish.CLOTHED)) & (uz < -0.05), (0.035, 0.04, 0.06))
    leaves = one.finish == int(Finish.LEAVES)
    noise = value_noise(lx * 1.6 + lz * 2.1, ly * 1.6 - lz * 1.3, hit.solid)
    rough = (0.55 + 0.9 * noise)[..., None]
    fade = (hit.distance * rays.pixel_angle / 0.6).clamp(0, 1)[..., None]
    colour = torch.where(leaves[..., None], colour * (rough + (1 - rough) * fade), colour)
    return colour, normal, glow, one.pixel


def _put(under: Tensor, where: Tensor, rgb: tuple[float, ...]) -> Tensor:
    """A colour where a mask is true: [S, T, P, 3]."""
    return torch.where(where[..., None], rgb_like(under, rgb), under)
