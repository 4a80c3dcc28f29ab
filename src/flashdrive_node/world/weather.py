"""Times of day and weather, and what stands beside the road: sampled per scene on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from flashdrive_node.world.draws import Draws, Floats
from flashdrive_node.world.scene import LANE_M, Props, Weather

#: Relative frequency, then ambient light, sunlight, zenith and horizon colours (linear RGB) and range of sun elevation.
_SKIES: tuple[
    tuple[float, tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...], float, float], ...
]
_SKIES = (
    (0.45, (0.36, 0.40, 0.46), (0.66, 0.62, 0.54), (0.20, 0.38, 0.72), (0.66, 0.76, 0.86), 35.0, 65.0),  # clear
    (0.27, (0.58, 0.60, 0.63), (0.06, 0.06, 0.06), (0.56, 0.60, 0.65), (0.74, 0.76, 0.78), 40.0, 65.0),  # overcast
    (0.18, (0.28, 0.27, 0.31), (0.72, 0.46, 0.24), (0.22, 0.30, 0.52), (0.92, 0.66, 0.42), 12.0, 24.0),  # low sun
    (0.10, (0.045, 0.05, 0.07), (0.0, 0.0, 0.0), (0.01, 0.015, 0.03), (0.04, 0.045, 0.06), 50.0, 60.0),  # night
)
#: Props: one cell per side and 12 m of road.
_CELL_M, _FIRST_M, _CELLS = 12.0, -70.0, 56


def sample_weather(draws: Draws) -> Weather:
    """Sky, sun and fog of every scene."""
    edges = np.cumsum([sky[0] for sky in _SKIES])[:-1]
    sky = np.searchsorted(edges, draws.uniform("sky"), side="right")

    def column(i: int) -> Floats:
        return np.array([s[i] for s in _SKIES], float)[sky]

    elevation = np.radians(draws.uniform("elevation") * (column(6) - column(5)) + column(5))
    azimuth = draws.uniform("azimuth", 0, 2 * np.pi)
    flat = np.cos(elevation)
    sun = np.stack((flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)), axis=1)
    foggy = draws.chance("foggy", 0.15)
    visibility = np.where(foggy, draws.uniform("fog", 70, 180), draws.uniform("haze", 500, 1500))
    # Fog scatters the sun and takes the colour out of the sky.
    sunlight = column(2) * np.where(foggy, 0.25, 1.0)[:, None]
    horizon = np.where(foggy[:, None], column(4).mean(1, keepdims=True), column(4))
    zenith = np.where(foggy[:, None], horizon, column(3))
    values = (sun, column(1), sunlight, zenith, horizon, visibility, (sky == 3).astype(float))
    return Weather(*(torch.from_numpy(np.ascontiguousarray(v)) for v in values))


def sample_props(draws: Draws, left_edge: Floats, right_edge: Floats, junction_s: Floats) -> Props:
    """Trees, buildings and lamp posts on both sides, away from the asphalt.

    Args:
        draws: Of the scenes.
        left_edge, right_edge: Distances from the ego lane's centre to the edges of the road [S], both positive, metres.
        junction_s: Where a road crosses, which must stay free [S], metres.
    """
    scenes = len(draws.keys)
    shape = (2, _CELLS)
    cell = _FIRST_M + _CELL_M * (np.arange(_CELLS) + 0.5)
    s = cell[None, None] + draws.uniform("prop s", -3.0, 3.0, *shape)
    urban = draws.uniform("urban", 0, 1)[:, None, None]
    pick = draws.uniform("prop kind", 0, 1, *shape)
    building = pick < 0.55 * (urban > 0.5)
    lamp = ~building & (pick > 0.88)
    tree = ~building & ~lamp & (pick < 0.8)
    kind = np.where(building, 2, np.where(lamp, 3, np.where(tree, 1, 0)))
    size = np.where(building, 5.6, draws.uniform("crown", 1.2, 2.6, *shape))
    height = np.where(building, draws.uniform("storeys", 5, 16, *shape), draws.uniform("tree height", 4, 9, *shape))
    height = np.where(lamp, 7.0, height)
    beyond = np.where(lamp, 1.2, np.where(building, 9.0, draws.uniform("set back", 4.0, 11.0, *shape)))
    edge = np.stack((left_edge, right_edge), axis=1)[:, :, None]
    d = (edge + beyond) * np.array([1.0, -1.0])[None, :, None]
    # A crossing road, and the road that the ego turns into, stay free.
    free = np.abs(s - junction_s[:, None, None]) < 3.5 * LANE_M
    kind = np.where(free, 0, kind)
    paint = draws.integer("prop paint", 256, *shape)
    return Props(*(torch.from_numpy(a.reshape(scenes, -1).copy()) for a in (kind, s, d, size, height, paint)))
