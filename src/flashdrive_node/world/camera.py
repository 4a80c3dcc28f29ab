"""The four front cameras of the PhysicalAI vehicles: where they sit and which way every pixel looks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Camera:
    """One camera in the vehicle frame (x forward, y left, z up, origin on the ground under the rear axle)."""

    name: str
    #: Index in the model's naming.
    index: int
    #: Metres.
    position: tuple[float, float, float]
    #: Heading, left positive, degrees.
    yaw_deg: float
    #: Over the width of the image, degrees.
    field_of_view_deg: float
    #: "ftheta" (distance from the image centre proportional to the angle) or "pinhole".
    projection: str = "ftheta"


#: Names, headings and fields of view as published; positions are those of a mid-size car.
CAMERAS = (
    Camera("cross_left", 0, (2.4, 0.95, 0.95), 55.0, 120.0),
    Camera("front_wide", 1, (1.75, 0.0, 1.45), 0.0, 120.0),
    Camera("cross_right", 2, (2.4, -0.95, 0.95), -55.0, 120.0),
    Camera("front_tele", 6, (1.75, -0.1, 1.45), 0.0, 30.0),
)


class Rays(NamedTuple):
    """What the pixels of one image look along, in the vehicle frame."""

    #: Unit vectors [T, P, 3]: T tiles of whole columns, P pixels in each, row by row.
    direction: Tensor
    #: Camera position [3], metres.
    origin: Tensor
    #: Horizontal direction of the camera's axis [2].
    axis: Tensor
    #: Middle and half width of every tile's azimuth from the camera's axis [T], radians.
    tile_azimuth: Tensor
    tile_reach: Tensor
    #: Angle between neighbouring pixels [], radians.
    pixel_angle: Tensor
    height: int
    width: int


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made during inference, they must serve elsewhere as well
def camera_rays(camera: Camera, width: int, height: int, device: torch.device | str = "cpu", tiles: int = 8) -> Rays:
    """Rays through the pixel centres, computed on the CPU so that every device uses the same numbers, and kept.

    Raises:
        ValueError: The width is no multiple of the number of tiles, or the projection is unknown.
    """
    if width % tiles:
        raise ValueError(f"{camera.name}: the image width must be a multiple of {tiles} (tiles), found {width}")
    half = math.radians(camera.field_of_view_deg) / 2
    u = (torch.arange(width, dtype=torch.float64) + 0.5 - width / 2) / (width / 2)
    v = (torch.arange(height, dtype=torch.float64) + 0.5 - height / 2) / (width / 2)
    v, u = torch.meshgrid(v, u, indexing="ij")
    radius = torch.sqrt(u * u + v * v).clamp(min=1e-9)
    if camera.projection == "ftheta":
        angle = radius * half
    elif camera.projection == "pinhole":
        angle = torch.atan(radius * math.tan(half))
    else:
        raise ValueError(f"{camera.name}: projection must be ftheta or pinhole, found {camera.projection!r}")
    forward = angle.cos()
    left, up = -u / radius * angle.sin(), -v / radius * angle.sin()
    azimuth = torch.atan2(left, forward).reshape(height, tiles, -1).permute(1, 0, 2).flatten(1)
    low, high = azimuth.amin(dim=1), azimuth.amax(dim=1)
    yaw = math.radians(camera.yaw_deg)
    x = math.cos(yaw) * forward - math.sin(yaw) * left
    y = math.sin(yaw) * forward + math.cos(yaw) * left
    direction = torch.stack((x, y, up), dim=-1).reshape(height, tiles, -1, 3).permute(1, 0, 2, 3).flatten(1, 2)
    pixel = 2 * half / width if camera.projection == "ftheta" else 2 * math.tan(half) / width
    return Rays(
        direction.float().to(device),
        torch.tensor(camera.position, dtype=torch.float32, device=device),
        torch.tensor((math.cos(yaw), math.sin(yaw)), dtype=torch.float32, device=device),
        ((low + high) / 2).float().to(device),
        ((high - low) / 2).float().to(device),
        torch.tensor(pixel, dtype=torch.float32, device=device),
        height,
        width,
    )


def image_of(tiled: Tensor, rays: Rays) -> Tensor:
    """Pixels in tiles [S, T, P, ...] as images [S, H, W, ...]."""
    scenes, tiles = tiled.shape[:2]
    image = tiled.reshape(scenes, tiles, rays.height, rays.width // tiles, *tiled.shape[3:])
    return image.transpose(1, 2).reshape(scenes, rays.height, rays.width, *tiled.shape[3:])
