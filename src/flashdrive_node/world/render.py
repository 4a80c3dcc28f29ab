"""What a camera sees: images, classes and distances of S scenes at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flashdrive_node.world.camera import Camera, Rays, camera_rays, image_of
from flashdrive_node.world.ground import GroundPoints, paint_ground
from flashdrive_node.world.raycast import FAR_M, cast, shade_on_ground
from flashdrive_node.world.scene import Scene
from flashdrive_node.world.solids import Pixel, Solids, build_solids
from flashdrive_node.world.state import State
from flashdrive_node.world.surface import paint_solids

#: Beyond this the ground is haze, metres.
_GROUND_REACH_M = 600.0


class View(NamedTuple):
    """One camera's view of S scenes."""

    #: uint8 [S, H, W, 3], sRGB.
    image: Tensor
    #: `Pixel` [S, H, W], uint8, and distance [S, H, W], metres, float32 (`FAR_M` for the sky).
    pixel: Tensor
    distance: Tensor


@torch.no_grad()
def render(
    scene: Scene, state: State, camera: Camera, width: int, height: int, samples: int = 1, compiled: bool = False
) -> View:
    """Render one camera.

    Args:
        scene, state: S scenes, on any device.
        camera: One of `CAMERAS`, or another.
        width, height: Of the image, pixels; width x samples must be a multiple of 8.
        samples: Rays per pixel along each side: 2 smooths the edges of things at four times the cost.
            Classes and distances come from the ray nearest to the corner of the pixel.
        compiled: Fuse the arithmetic with torch.compile, once per batch and image size: much faster on a GPU, and not
            bit for bit what it is otherwise.

    Raises:
        ValueError: A size below one, or a width that does not fit.
    """
    if min(width, height, samples) < 1:
        raise ValueError(f"width, height and samples must be at least 1, found {width} x {height}, {samples}")
    rays = camera_rays(camera, width * samples, height * samples, scene.device)
    solids = build_solids(scene, state)
    colour, pixel, distance = (_compiled_shade if compiled else _shade)(scene, state, solids, rays)
    image = image_of(colour, rays)
    if samples > 1:
        image = avg_pool2d(image.permute(0, 3, 1, 2), samples).permute(0, 2, 3, 1)
    encoded = image.clamp(0, 1) ** (1 / 2.2)
    step = slice(None, None, samples)
    return View(
        (encoded * 255 + 0.5).to(torch.uint8),
        image_of(pixel, rays)[:, step, step].to(torch.uint8),
        image_of(distance, rays)[:, step, step],
    )


def _shade(scene: Scene, state: State, solids: Solids, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    """Linear RGB [S, T, P, 3], `Pixel` and distance [S, T, P]."""
    weather = scene.weather
    d = rays.direction[None]
    sun = _to_vehicle(weather.sun, state)
    hit = cast(solids, rays)
    down = (-d[..., 2]).clamp(min=1e-5)
    to_ground = (rays.origin[2] / down).expand_as(hit.distance)
    sees_ground = (d[..., 2] < 0).expand_as(hit.distance) & (to_ground < hit.distance) & (to_ground < _GROUND_REACH_M)
    sees_solid = ~sees_ground & (hit.distance < FAR_M)

    ground_at = to_ground.clamp(max=_GROUND_REACH_M)
    x, y = rays.origin[0] + ground_at * d[..., 0], rays.origin[1] + ground_at * d[..., 1]
    flat = torch.sqrt(d[..., 0] ** 2 + d[..., 1] ** 2).clamp(min=1e-4)
    across = ground_at * rays.pixel_angle
    along = across / down
    look_x, look_y = (d[..., 0] / flat).expand_as(x), (d[..., 1] / flat).expand_as(x)
    ground, ground_pixel = paint_ground(scene, state, GroundPoints(x, y, across, along, look_x, look_y))
    sunny, open_sky = shade_on_ground(solids, rays, x, y, sun)
    light = _light(scene, x, y, (sunny * sun[:, 2, None, None]), open_sky)
    ground = ground * light

    solid, normal, glow, solid_pixel = paint_solids(solids, hit, rays, weather.night)
    facing = (normal * sun[:, None, None]).sum(dim=-1).clamp(min=0)
    # From below comes little light.
    open_sky = 0.72 + 0.28 * normal[..., 2]
    point = rays.origin + hit.distance.clamp(max=500.0)[..., None] * d
    solid = solid * _light(scene, point[..., 0], point[..., 1], facing, open_sky) + glow

    colour = torch.where(sees_ground[..., None], ground, solid)
    distance = torch.where(sees_ground, to_ground, hit.distance)
    sky = _sky(scene, d, sun)
    haze = _per_scene(weather.horizon)
    clear = torch.exp(-distance / weather.visibility.float()[:, None, None])[..., None]
    # Lamps shine through.
    clear = torch.maximum(clear, (glow.amax(dim=-1, keepdim=True) * 0.8).clamp(max=0.9) * sees_solid[..., None])
    colour = haze + (colour - haze) * clear
    sees = sees_ground | sees_solid
    colour = torch.where(sees[..., None], colour, sky)
    pixel = torch.where(sees_ground, ground_pixel, torch.where(sees_solid, solid_pixel, int(Pixel.SKY)))
    return colour, pixel, torch.where(sees, distance, torch.full_like(distance, FAR_M))


def _compiled_shade(scene: Scene, state: State, solids: Solids, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    return _compiler()(scene, state, solids, rays)


@cache
def _compiler() -> Callable[[Scene, State, Solids, Rays], tuple[Tensor, Tensor, Tensor]]:
    # Not before it is needed: loading the compiler takes seconds.
    return torch.compile(_shade, dynamic=False)


def _per_scene(colour: Tensor) -> Tensor:
    """[S, 3] -> [S, 1, 1, 3] float32."""
    return colour.float()[:, None, None]


def _to_vehicle(direction: Tensor, state: State) -> Tensor:
    """World directions [S, 3] in the vehicle frame, float32."""
    c, s = state.yaw.cos(), state.yaw.sin()
    x, y, z = direction.unbind(1)
    return torch.stack((c * x + s * y, c * y - s * x, z), dim=1).float()


def _light(scene: Scene, x: Tensor, y: Tensor, sunny: Tensor, open_sky: Tensor) -> Tensor:
    """Light that falls on points: [S, T, P, 3]. At night mostly that of the ego's own headlights."""
    weather = scene.weather
    light = _per_scene(weather.ambient) * open_sky[..., None] + _per_scene(weather.sunlight) * sunny[..., None]
    ahead = (x - 3.5).clamp(min=0)
    beam = torch.exp(-((y / (2.5 + 0.22 * ahead)) ** 2)) * torch.exp(-ahead / 28.0) * (x > 3.0)
    return (light + (1.4 * weather.night.float()[:, None, None] * beam)[..., None]) * 1.6


def _sky(scene: Scene, d: Tensor, sun: Tensor) -> Tensor:
    """Colour of the sky along rays [1, T, P, 3]: [S, T, P, 3]."""
    up = d[..., 2].clamp(0, 1)
    share = torch.sqrt(up)[..., None]
    horizon, zenith = _per_scene(scene.weather.horizon), _per_scene(scene.weather.zenith)
    toward = (d * sun[:, None, None]).sum(dim=-1).clamp(min=0)
    halo = toward**8
    halo = 0.25 * halo + 0.75 * (halo**16)
    return horizon + (zenith - horizon) * share + halo[..., None] * _per_scene(scene.weather.sunlight)


def token_labels(view: View, patch: int = 32) -> tuple[Tensor, Tensor]:
    """What every visual token of a view shows, for auxiliary losses.

    Args:
        view: Of H and W that are multiples of the patch.
        patch: Pixels per token and side.

    Returns:
        Presence of every `Pixel` class, bool [S, H / patch, W / patch, 14], and the distance to the nearest thing that
        stands on the ground, float32 [S, H / patch, W / patch], metres (`FAR_M` for none).
    """
    scenes, height, width = view.pixel.shape
    if height % patch or width % patch:
        raise ValueError(f"the sides of the view must be multiples of {patch}, found {width} x {height}")

    def blocks(t: Tensor) -> Tensor:
        t = t.reshape(scenes, height // patch, patch, width // patch, patch)
        return t.permute(0, 1, 3, 2, 4).flatten(3)

    pixel = blocks(view.pixel.long())
    presence = torch.stack([(pixel == int(p)).any(dim=3) for p in Pixel], dim=3)
    stands = pixel >= int(Pixel.STATIC)
    distance = torch.where(stands, blocks(view.distance), torch.full_like(blocks(view.distance), FAR_M))
    return presence, distance.amin(dim=3)
