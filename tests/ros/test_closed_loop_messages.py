"""What a world publishes and reads: pictures, calibration, odometry and trajectories as messages, and its clock."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from rclpy.serialization import serialize_message
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Header

from flashdrive_node.evaluation.world_views import world_cameras
from flashdrive_node.ros import messages
from flashdrive_node.ros.messages import OutputFrame
from flashdrive_node.ros.picture_messages import camera_info_message, compressed_message, raw_message
from flashdrive_node.ros.published_plan import PlanError, read_plan
from flashdrive_node.ros.serialized import compressed_image, raw_image
from flashdrive_node.ros.world_clock import WorldClock
from flashdrive_node.runtime.decode import decode_image, signature
from flashdrive_node.runtime.rig import RigError, load_rig
from flashdrive_node.world.camera import CAMERAS, camera_rays, image_of
from support.windows import T0_NS, arc, prediction


def header(stamp_ns: int = T0_NS, frame: str = "front") -> Header:
    return Header(stamp=messages.stamp_message(stamp_ns), frame_id=frame)


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (24, 40, 3), np.uint8)


def files(picture: np.ndarray, stamp_ns: int) -> dict:
    """The picture in every transport, as the node reads it."""
    raw = raw_message(header(stamp_ns), picture)
    found = {"raw": raw_image(bytes(serialize_message(raw)))}
    for kind in ("jpeg", "png"):
        message = compressed_message(header(stamp_ns), picture, kind)
        found[kind] = compressed_image(bytes(serialize_message(message)))
    return found


def test_png_and_raw_keep_every_pixel_and_jpeg_is_near(picture):
    decoded = {kind: decode_image(image) for kind, image in files(picture, T0_NS).items()}
    assert (decoded["png"] == picture).all()
    assert (decoded["raw"] == picture).all()
    smooth = np.broadcast_to(np.linspace(0, 255, 40)[None, :, None], (24, 40, 3)).astype(np.uint8)
    assert np.abs(decode_image(files(smooth, T0_NS)["jpeg"]).astype(int) - smooth).max() <= 4


def test_equal_pictures_of_different_times_are_no_camera_that_hangs(picture):
    first, second, again = (files(picture, stamp) for stamp in (T0_NS, T0_NS + 100_000_000, T0_NS))
    for kind in first:
        assert signature(first[kind]) != signature(second[kind]), kind
        assert signature(first[kind]) == signature(again[kind]), kind
        assert (decode_image(first[kind]) == decode_image(second[kind])).all(), kind


def test_a_format_that_is_none_is_refused(picture):
    with pytest.raises(ValueError, match="must be one of jpeg, png, found 'bmp'"):
        compressed_message(header(), picture, "bmp")


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c.name)
def test_calibration_projects_to_the_pixels_that_are_rendered(camera):
    width, height = 64, 40
    info = camera_info_message(header(), camera, width, height)
    assert (info.width, info.height, info.distortion_model, list(info.d)) == (width, height, "equidistant", [0.0] * 4)
    rays = camera_rays(camera, width, height)
    looks = image_of(rays.direction[None], rays)[0].double().numpy()  # [H, W, 3] in the vehicle frame
    yaw = math.radians(camera.yaw_deg)
    forward = math.cos(yaw) * looks[..., 0] + math.sin(yaw) * looks[..., 1]
    right = math.sin(yaw) * looks[..., 0] - math.cos(yaw) * looks[..., 1]
    down = -looks[..., 2]
    angle = np.arctan2(np.hypot(right, down), forward)
    share = info.k[0] * angle / np.hypot(right, down)
    columns, rows = share * right + info.k[2], share * down + info.k[5]
    np.testing.assert_allclose(columns, np.broadcast_to(np.arange(width), (height, width)), atol=1e-3)
    np.testing.assert_allclose(rows, np.broadcast_to(np.arange(height)[:, None], (height, width)), atol=1e-3)


def published(frame: OutputFrame):
    sample = prediction(arc(speed=8.0, curvature=0.09)).trajectory
    head = Header(stamp=messages.stamp_message(T0_NS), frame_id=frame.frame_id)
    return sample, messages.joint_trajectory_message(head, "base_link", sample, messages.poses(sample, frame))


@pytest.mark.parametrize("yaw0", [0.0, 2.9, -3.0])
def test_a_trajectory_comes_back_from_either_frame(yaw0):
    pose = (120.0, -45.0, yaw0)
    odom = OutputFrame("odom", (pose[0], pose[1], 0.3), (0.0, 0.0, math.sin(yaw0 / 2), math.cos(yaw0 / 2)))
    for frame in (OutputFrame("base_link"), odom):
        sample, message = published(frame)
        plan = read_plan(message).seen_from("base_link", "odom", pose)
        assert (plan.t0_ns, plan.frame_id) == (T0_NS, "base_link")
        np.testing.assert_allclose(plan.after_s, 0.1 * np.arange(1, 65), atol=1e-9)
        np.testing.assert_allclose(plan.xy, sample.xyz[:, :2], atol=1e-6)
        np.testing.assert_allclose(plan.yaw, sample.yaw, atol=1e-6)
        np.testing.assert_allclose(plan.speed, sample.speed, atol=1e-6)


def test_trajectories_that_nobody_can_drive_are_refused():
    _, message = published(OutputFrame("map"))
    with pytest.raises(PlanError, match="in frame 'base_link' or 'odom' is required, found 'map'"):
        read_plan(message).seen_from("base_link", "odom", (0.0, 0.0, 0.0))
    message.points = []
    with pytest.raises(PlanError, match="a trajectory with points is required, found none"):
        read_plan(message)


def test_a_rig_with_a_camera_that_the_world_lacks_is_refused(tmp_path):
    assert [camera.index for camera in world_cameras(load_rig("sample")).values()] == [0, 1, 2, 6]
    path = tmp_path / "rig.yaml"
    entry = "{name: rear, index: 4, topic: /rear, transport: compressed, rate_hz: 10.0}"
    path.write_text(f"name: rear\nodometry_topic: /odometry\ncameras:\n  - {entry}\n")
    with pytest.raises(RigError, match=r"camera 'rear' has index 4, the world has cameras \[0, 1, 2, 6\]"):
        world_cameras(load_rig(path))


@pytest.mark.ros
def test_the_clock_never_goes_back_and_stretches_for_a_late_world(bench):
    heard: list[int] = []
    bench.node.create_subscription(Clock, "/clock", lambda m: heard.append(messages.stamp_ns(m.clock)), 50)
    clock = WorldClock(bench.node)
    clock.tell(1_000_000_000)
    clock.tell(900_000_000)
    assert clock.run_to(1_100_000_000) == 0.0
    began = time.monotonic()
    assert clock.run_to(1_200_000_000) == 0.0
    assert time.monotonic() - began == pytest.approx(0.1, abs=0.03)
    time.sleep(0.25)
    assert clock.run_to(1_300_000_000) == pytest.approx(0.15, abs=0.05), "as late as it was"
    began = time.monotonic()
    assert clock.run_to(1_400_000_000) == 0.0
    assert time.monotonic() - began == pytest.approx(0.1, abs=0.03), "and from there on in time again"
    clock.close()
    time.sleep(0.1)
    assert heard == sorted(heard)
    assert heard[-1] < 1_400_000_000
    assert len(heard) > 20
