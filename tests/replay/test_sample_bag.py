"""The drawn drive: deterministic, consistent in itself, and of the shape that the sample rig says."""

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin

from flashdrive_node.evaluation.drawn_scene import Drive
from flashdrive_node.evaluation.sample_bag import CAMERA_DELAY_NS, START_NS, make_synthetic_bag
from flashdrive_node.runtime.bag import messages, open_bag, rig_topics, select
from flashdrive_node.runtime.rig import Rig, load_rig, parse_rig


def contents(path: Path) -> list[tuple[str, int, bytes]]:
    with open_bag(path) as reader:
        return [(c.topic, stamp, bytes(raw)) for c, stamp, raw in messages(reader, reader.connections)]


def decoded(path: Path, topic: str) -> list[tuple[int, Any]]:
    with open_bag(path) as reader:
        wanted = [c for c in reader.connections if c.topic == topic]
        return [(stamp, reader.deserialize(raw, c.msgtype)) for c, stamp, raw in messages(reader, wanted)]


def test_same_seed_same_messages_in_both_storages(tmp_path: Path, rig: Rig) -> None:
    options: dict[str, Any] = {"seconds": 0.5, "width": 96, "height": 54}
    make_synthetic_bag(tmp_path / "a", rig, **options)
    make_synthetic_bag(tmp_path / "b", rig, **options, storage=StoragePlugin.SQLITE3)
    make_synthetic_bag(tmp_path / "c", rig, **options, seed=1)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert hashlib.sha256(repr(first).encode()).digest() != hashlib.sha256(repr(other).encode()).digest()


def test_holds_every_topic_of_the_rig_at_its_rate(drive: Path, rig: Rig) -> None:
    with open_bag(drive) as reader:
        held = {topic: (info.msgtype, info.msgcount) for topic, info in reader.topics.items()}
        assert {c.topic for c in select(reader, rig)} == set(rig_topics(rig))
    assert {topic: kind for topic, (kind, _) in held.items()} == {t: kind for t, (kind, _) in rig_topics(rig).items()}
    for camera in rig.cameras:
        assert held[camera.topic][1] == 4.0 * camera.rate_hz + 1
    assert held[rig.odometry_topic][1] == 201


def test_stamps_grow_and_are_recorded_after_they_were_taken(drive: Path, rig: Rig) -> None:
    for camera in rig.cameras:
        frames = decoded(drive, camera.topic)
        stamps = np.array([m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for _, m in frames])
        assert stamps[0] == START_NS
        assert (np.abs(np.diff(stamps) - 1e9 / camera.rate_hz) <= 1).all()
        assert ([recorded for recorded, _ in frames] - stamps == CAMERA_DELAY_NS).all()
        picture = cv2.imdecode(frames[0][1].data, cv2.IMREAD_COLOR)
        assert picture.shape == (108, 192, 3)


def test_odometry_pose_is_the_integral_of_its_twist(drive: Path, rig: Rig) -> None:
    table = []
    for _, m in decoded(drive, rig.odometry_topic):
        p, q = m.pose.pose.position, m.pose.pose.orientation
        table.append((p.x, p.y, 2 * np.arctan2(q.z, q.w), m.twist.twist.linear.x, m.twist.twist.angular.z))
    x, y, yaw, speed, yaw_rate = np.array(table).T
    middle = (yaw[1:] + yaw[:-1]) / 2
    step = (speed[1:] + speed[:-1]) / 2 * 0.02
    np.testing.assert_allclose(np.diff(x), step * np.cos(middle), atol=2e-3)
    np.testing.assert_allclose(np.diff(y), step * np.sin(middle), atol=2e-3)
    np.testing.assert_allclose(np.diff(yaw), (yaw_rate[1:] + yaw_rate[:-1]) / 2 * 0.02, atol=2e-3)
    assert 5.0 < speed.min() < speed.max() < 20.0


def test_pictures_move_with_the_vehicle() -> None:
    scene = Drive(3.0)
    now, soon, later = (scene.draw(t, 1, 192, 108).astype(int) for t in (1.0, 1.02, 2.0))
    road = np.s_[60:]
    assert 0 < np.abs(soon - now)[road].mean() < np.abs(later - now)[road].mean()
    # The two sides look at different parts of the world.
    assert np.abs(scene.draw(1.0, 0, 192, 108).astype(int) - scene.draw(1.0, 2, 192, 108)).mean() > 5


def test_gap_leaves_out_camera_frames_only(tmp_path: Path, rig: Rig) -> None:
    summary = make_synthetic_bag(tmp_path / "bag", rig, seconds=1.0, width=96, height=54, gap=(0.35, 0.75))
    assert (summary.frames, summary.odometry) == (4 * 7, 51)


def test_refuses_what_it_cannot_write(tmp_path: Path, drive: Path, rig: Rig) -> None:
    with pytest.raises(FileExistsError, match="new directory"):
        make_synthetic_bag(drive, rig)
    raw = {"name": "a", "index": 0, "topic": "/a", "transport": "raw", "rate_hz": 10.0}
    with pytest.raises(ValueError, match="camera a: transport 'compressed' is required"):
        make_synthetic_bag(tmp_path / "bag", parse_rig({"name": "r", "odometry_topic": "/o", "cameras": [raw]}, "test"))


def test_camera_sizes_of_a_rig_are_kept(tmp_path: Path) -> None:
    rig = load_rig("sample")
    sized = parse_rig(
        {
            "name": "sized",
            "odometry_topic": "/odometry",
            "cameras": [
                {
                    "name": c.name,
                    "index": c.index,
                    "topic": c.topic,
                    "rate_hz": 20.0,
                    "width": 64 + c.index,
                    "height": 48,
                }
                for c in rig.cameras
            ],
        },
        "test",
    )
    make_synthetic_bag(tmp_path / "bag", sized, seconds=0.1)
    for camera in sized.cameras:
        frames = decoded(tmp_path / "bag", camera.topic)
        assert len(frames) == 3
        assert cv2.imdecode(frames[0][1].data, cv2.IMREAD_COLOR).shape == (48, 64 + camera.index, 3)
