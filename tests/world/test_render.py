"""Pictures: what is where, the same every time, the same on every device."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from flashdrive_node.world.camera import CAMERAS, Camera, camera_rays, image_of
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import Episode
from flashdrive_node.world.raycast import FAR_M
from flashdrive_node.world.render import View, render, token_labels
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import Kind, Scenario, move, select
from flashdrive_node.world.sight import sight
from flashdrive_node.world.solids import Pixel
from flashdrive_node.world.state import agent_poses, first_state

WIDTH, HEIGHT = 96, 64
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
WIDE, TELE = CAMERAS[1], CAMERAS[3]


def view_of(episode: Episode, step: int, rows: torch.Tensor, camera: Camera, **options: int) -> View:
    size = {"width": WIDTH, "height": HEIGHT, **options}
    return render(select(episode.scene, rows), select(episode.states[step], rows), camera, **size)


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c.name)
def test_rays_follow_the_projection(camera: Camera) -> None:
    rays = camera_rays(camera, 64, 32)
    direction = image_of(rays.direction[None], rays)[0].double()
    assert torch.allclose(direction.norm(dim=-1), torch.ones(32, 64, dtype=torch.float64), atol=1e-6)
    axis = torch.tensor([math.cos(math.radians(camera.yaw_deg)), math.sin(math.radians(camera.yaw_deg)), 0.0])
    angles = torch.acos((direction @ axis.double()).clamp(-1, 1))
    # In the middle row the angle from the axis grows by the same amount from column to column.
    u = (torch.arange(64) + 0.5 - 32) / 32 * math.radians(camera.field_of_view_deg) / 2
    v = 0.5 / 32 * math.radians(camera.field_of_view_deg) / 2
    assert torch.allclose(angles[16], torch.sqrt(u.double() ** 2 + v**2), atol=1e-4)
    # Left in the picture is left of the car, down is down.
    assert direction[16, 0, 0] * axis[1] - direction[16, 0, 1] * axis[0] < 0
    assert direction[31, 32, 2] < direction[0, 32, 2]


def test_pinhole_and_bad_cameras() -> None:
    pinhole = Camera("test", 1, (0.0, 0.0, 1.0), 0.0, 90.0, "pinhole")
    rays = camera_rays(pinhole, 16, 8)
    direction = image_of(rays.direction[None], rays)[0]
    assert torch.allclose(direction[4, :, 1] / direction[4, :, 0], -(torch.arange(16) + 0.5 - 8) / 8, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 8"):
        camera_rays(pinhole, 20, 8)
    with pytest.raises(ValueError, match="ftheta or pinhole"):
        camera_rays(Camera("test", 1, (0.0, 0.0, 1.0), 0.0, 90.0, "round"), 16, 8)


def test_sky_is_above_and_road_ahead(episode: Episode) -> None:
    rows = torch.arange(0, len(episode.scene), 9)
    pixel = view_of(episode, 40, rows, WIDE).pixel.long()
    below = pixel[:, -HEIGHT // 4 :, WIDTH // 3 : -WIDTH // 3]
    assert ((below == int(Pixel.ROAD)) | (below == int(Pixel.MARKING))).double().mean() > 0.9
    assert (pixel[:, 0] == int(Pixel.SKY)).double().mean() > 0.4
    assert not (pixel[:, HEIGHT * 2 // 3 :] == int(Pixel.SKY)).any()


def test_distances_of_the_ground_are_exact(episode: Episode) -> None:
    view = view_of(episode, 40, torch.arange(0, 20), WIDE)
    rays = camera_rays(WIDE, WIDTH, HEIGHT)
    down = -image_of(rays.direction[None], rays)[..., 2]
    ground = (view.pixel == int(Pixel.ROAD)) | (view.pixel == int(Pixel.GROUND))
    expected = (rays.origin[2] / down.clamp(min=1e-5)).expand_as(view.distance)
    assert torch.allclose(view.distance[ground], expected[ground])
    assert (view.distance[view.pixel == int(Pixel.SKY)] == FAR_M).all()


def test_the_lead_is_where_it_is(episode: Episode) -> None:
    rows = (episode.scene.scenario == int(Scenario.STOP_AND_GO)).nonzero()[:, 0]
    step = 60
    view = view_of(episode, step, rows, TELE)
    scene, state = select(episode.scene, rows), select(episode.states[step], rows)
    x, y, _ = agent_poses(scene, state)
    gap = torch.sqrt((x[:, 0] - state.x) ** 2 + (y[:, 0] - state.y) ** 2) - 0.5 * scene.agents.length[:, 0] - 1.75
    bearing = torch.atan2(y[:, 0] - state.y, x[:, 0] - state.x) - state.yaw
    middle = view.distance[:, HEIGHT // 2 + 1, WIDTH // 2]
    kind = view.pixel[:, HEIGHT // 2 + 1, WIDTH // 2].long()
    seen = (gap < 40) & (bearing.abs() < 0.02)
    assert seen.sum() >= 3
    assert ((kind == int(Pixel.CAR)) | (kind == int(Pixel.TRUCK)))[seen].all()
    assert ((middle - gap).abs() < 1.5)[seen].all()


def test_lights_show_their_colour() -> None:
    scene = sample_scenes(scene_keys("validation", range(16)), Scenario.RED_LIGHT)
    state = first_state(scene)
    ahead = scene.stop_line_s - 30.0
    moved = {**vars(state), "x": ahead, "s": ahead, "time_s": scene.light_times[:, 1] + 1.0}
    red = type(state)(**moved)
    green = type(state)(**{**moved, "time_s": scene.light_times[:, 2] + 1.0})
    for now, pixel, channel in ((red, Pixel.RED_LIGHT, 0), (green, Pixel.GREEN_LIGHT, 1)):
        view = render(scene, now, TELE, 256, 144)
        lamp = view.pixel == int(pixel)
        assert lamp.flatten(1).any(dim=1).double().mean() > 0.9
        colours = view.image[lamp].double()
        bright = colours[colours.amax(dim=1) > 180]
        assert len(bright) > 10
        assert (bright.argmax(dim=1) == channel).double().mean() > 0.9


def test_what_sight_says_is_in_the_pictures(episode: Episode) -> None:
    """Agents near enough to be evidence show in at least one camera; what no camera shows is not evidence."""
    step, checked = 40, 0
    pixels = {Kind.CAR: Pixel.CAR, Kind.TRUCK: Pixel.TRUCK, Kind.PEDESTRIAN: Pixel.PEDESTRIAN, Kind.CONE: Pixel.CONE}
    rows = torch.arange(0, len(episode.scene), 16)
    scene, state = select(episode.scene, rows), select(episode.states[step], rows)
    seen = sight(scene, state).agents
    shown = [render(scene, state, c, 256, 144).pixel.flatten(1).long() for c in CAMERAS]
    for kind, pixel in pixels.items():
        mine = scene.agents.kind == int(kind)
        claimed = (seen & mine).any(dim=1)
        visible = torch.stack([(p == int(pixel)).any(dim=1) for p in shown]).any(dim=0)
        checked += int(claimed.sum())
        # Buildings and trees, which sight ignores, may hide a distant one.
        assert (claimed & ~visible).double().sum() <= max(1.0, 0.1 * float(claimed.sum())), kind
    assert checked > 12


def test_token_labels_pool_the_view(episode: Episode) -> None:
    view = view_of(episode, 40, torch.arange(6), WIDE)
    presence, distance = token_labels(view)
    assert presence.shape == (6, 2, 3, len(Pixel))
    assert distance.shape == (6, 2, 3)
    corner = view.pixel[:, :32, :32].flatten(1).long()
    for pixel in Pixel:
        assert torch.equal(presence[:, 0, 0, int(pixel)], (corner == int(pixel)).any(dim=1))
    stands = corner >= int(Pixel.STATIC)
    expected = torch.where(stands, view.distance[:, :32, :32].flatten(1), torch.tensor(FAR_M)).amin(dim=1)
    assert torch.equal(distance[:, 0, 0], expected)
    with pytest.raises(ValueError, match="multiples of 32"):
        token_labels(view_of(episode, 40, torch.arange(1), WIDE, width=88))


def test_pictures_repeat_and_do_not_depend_on_the_batch(episode: Episode) -> None:
    rows = torch.arange(30, 36)
    whole, one = view_of(episode, 40, rows, WIDE), view_of(episode, 40, rows[2:3], WIDE)
    assert (whole.image[2:3].int() - one.image.int()).abs().max() <= 1
    assert torch.equal(whole.pixel[2:3], one.pixel)


def test_supersampling_averages_rays(episode: Episode) -> None:
    rows = torch.arange(30, 33)
    once, twice = view_of(episode, 40, rows, WIDE), view_of(episode, 40, rows, WIDE, samples=2)
    assert once.image.shape == twice.image.shape == (3, HEIGHT, WIDTH, 3)
    assert (once.image.float().mean() - twice.image.float().mean()).abs() < 2
    assert not torch.equal(once.image, twice.image)
    with pytest.raises(ValueError, match="at least 1"):
        view_of(episode, 40, rows, WIDE, samples=0)


def test_pictures_are_the_recorded_ones() -> None:
    """Coarse colours and classes of four cameras: any change of the world shows in them."""
    scene = sample_scenes(scene_keys("test", [0]), Scenario.PEDESTRIAN)
    for camera, (mean, classes) in zip(CAMERAS, GOLDEN, strict=True):
        view = render(scene, first_state(scene), camera, WIDTH, HEIGHT)
        blocks = view.image[0].double().reshape(4, HEIGHT // 4, 4, WIDTH // 4, 3).mean(dim=(1, 3)).mean(dim=2)
        assert np.abs(blocks.numpy() - np.array(mean)).max() < 1.0, camera.name
        assert hashlib.sha256(view.pixel.numpy().tobytes()).hexdigest()[:12] == classes, camera.name


#: Mean grey of 4 x 4 blocks, and a hash of the classes, by camera.
GOLDEN = (
    (
        (
            (162.7, 209.7, 159.4, 204.5),
            (166.5, 216.7, 132.4, 156.9),
            (115.2, 104.5, 104.9, 100.8),
            (87.9, 88.0, 104.5, 92.1),
        ),
        "3d206f0dad53",
    ),
    (
        (
            (178.2, 194.9, 209.7, 134.2),
            (151.0, 148.5, 144.2, 145.1),
            (109.7, 102.0, 113.1, 110.0),
            (97.4, 89.8, 89.7, 120.8),
        ),
        "c261b5d5aca1",
    ),
    (
        (
            (207.5, 119.5, 204.4, 148.5),
            (153.4, 131.6, 216.3, 159.1),
            (112.4, 120.4, 109.2, 108.6),
            (91.2, 117.9, 124.2, 136.1),
        ),
        "ab595b48a7e0",
    ),
    (
        (
            (134.3, 215.8, 195.2, 115.8),
            (107.9, 165.8, 146.9, 113.1),
            (113.3, 107.8, 117.0, 123.2),
            (99.8, 90.7, 92.6, 124.4),
        ),
        "f41855a509ad",
    ),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c.name)
def test_every_device_draws_the_same(episode: Episode, camera: Camera, device: str) -> None:
    """Here and there, in another order of scenes: equal within one grey level."""
    rows = torch.arange(0, len(episode.scene), 40)
    here = view_of(episode, 40, rows, camera)
    scene = move(select(episode.scene, rows.flip(0)), device)
    state = move(select(episode.states[40], rows.flip(0)), device)
    there = render(scene, state, camera, WIDTH, HEIGHT)
    assert (here.image.int() - there.image.cpu().flip(0).int()).abs().max() <= 1
    assert torch.equal(here.pixel, there.pixel.cpu().flip(0))
