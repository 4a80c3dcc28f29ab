"""Paths appear in the pictures where the renderer shows the road, in every camera, and from above."""

import numpy as np
import pytest
import torch

from flashdrive_node.evaluation.drive_picture import (
    CAMERA_SIZE,
    DRIVEN,
    HEIGHT,
    PLAN,
    PLANNED,
    WIDTH,
    Moment,
    View,
    draw_moment,
    ribbon_edges,
)
from flashdrive_node.evaluation.plan_view import PlanFrame, plan_view
from flashdrive_node.evaluation.strips import Strip, strip_colors
from flashdrive_node.evaluation.world_bag import SceneChoice
from flashdrive_node.evaluation.world_views import camera_model
from flashdrive_node.runtime.camera_model import CameraModel, level_camera
from flashdrive_node.world.camera import CAMERAS, Camera, camera_rays, image_of
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.render import render
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import LANE_M, Scenario
from flashdrive_node.world.solids import Pixel
from flashdrive_node.world.state import first_state

PINHOLE = Camera("pinhole", 1, (1.5, 0.2, 1.4), 20.0, 80.0, "pinhole")


@pytest.fixture(scope="module")
def curve():
    """A bend, seen from its beginning: a scene and its first state."""
    scene = sample_scenes(scene_keys("test", [4]), Scenario.CURVE)
    return scene, first_state(scene)


@pytest.fixture(scope="module")
def turn():
    """Twelve seconds of a drive that turns left."""
    return SceneChoice("test", 126, 20.0).drive()


@pytest.mark.parametrize("camera", [*CAMERAS, PINHOLE], ids=lambda c: c.name)
def test_projection_inverts_the_rays_of_the_renderer(camera):
    width, height = 64, 40
    rays = camera_rays(camera, width, height)
    looks = image_of(rays.direction[None], rays)[0].double().numpy().reshape(-1, 3)
    points = np.array(camera.position) + looks * np.linspace(2.0, 60.0, len(looks))[:, None]
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    pixels = camera_model(camera, width, height).project(points)
    np.testing.assert_allclose(pixels, np.stack((columns.ravel(), rows.ravel()), axis=1), atol=2e-3)


def test_points_behind_are_nowhere():
    pixels = level_camera((64, 40), 80.0, False, (0.0, 0.0, 1.0), 0.0).project(np.array([[-5.0, 0.0, 0.0]]))
    assert np.isnan(pixels).all()


def test_plumb_bob_coefficients_bend_as_opencv():
    import cv2

    ideal = level_camera((640, 480), 90.0, False, (0.0, 0.0, 0.0), 0.0)
    coefficients = (-0.2, 0.05, 0.001, -0.002, 0.01)
    model = CameraModel(
        640, 480, "plumb_bob", coefficients, ideal.focal, ideal.principal, ideal.position, ideal.rotation
    )
    points = np.array([[5.0, 1.0, -0.5], [8.0, -3.0, 1.0], [4.0, 0.0, 0.0]])
    k = np.array(ideal.matrix()).reshape(3, 3)
    expected, _ = cv2.projectPoints(points @ ideal.rotation, np.zeros(3), np.zeros(3), k, np.array(coefficients))
    np.testing.assert_allclose(model.project(points), expected[:, 0], atol=1e-6)


def test_equidistant_coefficients_bend_as_opencv():
    import cv2

    ideal = level_camera((640, 480), 150.0, True, (0.0, 0.0, 0.0), 0.0)
    coefficients = (0.02, -0.01, 0.003, -0.001)
    model = CameraModel(
        640, 480, "equidistant", coefficients, ideal.focal, ideal.principal, ideal.position, ideal.rotation
    )
    points = np.array([[5.0, 1.0, -0.5], [2.0, -3.0, 1.0], [4.0, 0.0, 0.0]])
    k = np.array(ideal.matrix()).reshape(3, 3)
    optical = (points @ ideal.rotation)[:, None]
    expected, _ = cv2.fisheye.projectPoints(optical, np.zeros(3), np.zeros(3), k, np.array(coefficients))
    np.testing.assert_allclose(model.project(points), expected[:, 0], atol=1e-6)


def test_unknown_distortion_is_refused():
    with pytest.raises(ValueError, match=r"plumb_bob with 5, equidistant with 4 is required, found 'kannala' with 2"):
        CameraModel(8, 8, "kannala", (0.0, 0.0), (1.0, 1.0), (3.5, 3.5), np.zeros(3), np.eye(3))


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c.name)
def test_the_middle_line_of_a_bend_is_projected_onto_its_paint(curve, camera):
    scene, state = curve
    s = torch.arange(6.0, 45.0, 0.5, dtype=torch.float64)[None]
    x, y, _ = scene.road.pose_at(s, torch.full_like(s, LANE_M * (float(scene.lanes_left[0]) + 0.5)))
    line = torch.stack((x[0], y[0], torch.zeros_like(x[0])), dim=1).numpy()
    view = render(scene, state, camera, 288, 160)
    pixels = np.round(camera_model(camera, 288, 160).project(line)).astype(float)
    inside = (pixels >= 0).all(axis=1) & (pixels < (288, 160)).all(axis=1)
    seen = view.pixel[0].numpy()[tuple(pixels[inside].astype(int).T[::-1])]
    distance = np.linalg.norm(line - np.array(camera.position), axis=1)[inside]
    # The middle of a double line may be asphalt; what stands in front of it is no ground.
    ground = np.isin(seen, (Pixel.MARKING, Pixel.ROAD, Pixel.GROUND))
    reached = view.distance[0].numpy()[tuple(pixels[inside].astype(int).T[::-1])]
    assert inside.sum() >= (3 if camera.index in (0, 1, 6) else 0)
    # To one pixel: the ground's distance is the camera's height over the sine of the angle below the horizon.
    pixel = np.radians(camera.field_of_view_deg) / 288
    np.testing.assert_allclose(1 / reached[ground], 1 / distance[ground], atol=pixel / camera.position[2])
    assert not (seen == Pixel.GROUND).any()


def moment(turn, step: int, planned: np.ndarray, **values) -> Moment:
    truth = turn.future(step)[0][0].double().numpy()
    cameras = {camera.name: camera for camera in CAMERAS}
    views = []
    for name in ("front_wide", "front_tele", "cross_left", "cross_right"):
        picture = render(turn.scene, turn.states[step], cameras[name], 96, 56).image[0].numpy()
        views.append(View(name, picture, camera_model(cameras[name], 96, 56)))
    ground = plan_view(turn.scene, turn.states[step], PLAN)
    return Moment(step / 10, views, planned, truth, "Stop.", ground=ground, **values)


def near(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture.astype(int) - color).max(axis=2) < 12


def test_the_driven_path_lies_on_the_road_in_the_cameras_and_from_above(turn):
    step = 130
    nothing = np.zeros((0, 3))
    shown = draw_moment(moment(turn, step, nothing))
    assert shown.shape == (HEIGHT, WIDTH, 3)
    wide = near(shown[: CAMERA_SIZE[1], : CAMERA_SIZE[0]], DRIVEN)
    road = render(turn.scene, turn.states[step], CAMERAS[1], *CAMERA_SIZE).pixel[0].numpy()
    rows, columns = wide.nonzero()
    # Near the horizon a pixel is metres long.
    line = (rows > 0.6 * CAMERA_SIZE[1]) & (columns > 200) & (columns < 480)
    assert line.sum() > 100
    on_road = np.isin(road[rows[line], columns[line]], (Pixel.ROAD, Pixel.MARKING))
    assert on_road.mean() > 0.95
    # To the left, where the turn leads.
    plan = near(shown[: PLAN.height, -PLAN.width :], DRIVEN)
    plan[:80] = False
    assert plan.nonzero()[1].min() < PLAN.width / 2 - 8 * PLAN.scale


def test_words_figures_and_strips_change_the_picture(turn):
    path = np.stack((np.linspace(0.1, 30, 64), np.zeros(64), np.zeros(64)), axis=1)
    strips = [Strip("world", [(0.0, 5.0, "lead"), (5.0, 10.0, "turn")]), Strip("model", [(0.0, 10.0, "turn")])]
    plain = draw_moment(moment(turn, 130, path))
    assert near(plain[: CAMERA_SIZE[1], : CAMERA_SIZE[0]], PLANNED).sum() == 0  # it is translucent in the cameras
    words = {"truth": "Go.", "verdict": ("same decision", True), "figures": [("speed", "3 m/s")]}
    told = draw_moment(moment(turn, 130, path, **words, strips=strips, duration_s=10.0))
    below = np.s_[2 * CAMERA_SIZE[1] :]
    assert (plain[below] != told[below]).any(axis=2).sum() > 20_000
    assert (plain[: CAMERA_SIZE[1]] == told[: CAMERA_SIZE[1]]).all()
    colors = strip_colors(strips)
    assert list(colors) == ["lead", "turn"]
    assert len(set(colors.values())) == 2


def test_a_ribbon_has_its_width_everywhere():
    angle = np.linspace(0.01, 1.2, 50)
    path = np.stack((20 * np.sin(angle), 20 * (1 - np.cos(angle)), np.zeros(50)), axis=1)
    left, right = ribbon_edges(path, 0.75)
    np.testing.assert_allclose(np.linalg.norm(left - right, axis=1), 1.5, atol=1e-9)
    np.testing.assert_allclose(np.hypot(left[1:-1, 0], left[1:-1, 1] - 20), 20 - 0.75, atol=1e-3)
    standing = np.repeat(path[:1], 5, axis=0)
    assert len(ribbon_edges(standing, 0.75)[0]) == 0


def test_plan_view_shows_vehicles_where_they_are(turn):
    frame = PlanFrame(200, 360, ahead_m=60.0, behind_m=12.0)
    np.testing.assert_allclose(frame.pixels(np.array([[0.0, 0.0], [60.0, -20.0]])), [[100.0, 300.0], [200.0, 0.0]])
    # The car ahead in the lane, at the beginning of the drive.
    lead = plan_view(turn.scene, turn.states[40], frame)
    ahead = lead[:300, 90:110].astype(int)
    assert (ahead.min(axis=2) > 210).any()
