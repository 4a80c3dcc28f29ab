"""Recordings of the world: consistent in themselves, reproducible, described in full, and true."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from flashdrive_node.cli.main import main
from flashdrive_node.evaluation import varied_scene
from flashdrive_node.evaluation.bag_calibration import read_calibrations
from flashdrive_node.evaluation.bag_truth import TRUTH_TOPIC, read_truth
from flashdrive_node.evaluation.truth import Truth, compare, label_of, score_reasoning
from flashdrive_node.evaluation.world_bag import (
    CAMERA_DELAY_NS,
    START_NS,
    PictureSettings,
    SceneChoice,
    write_world_bag,
)
from flashdrive_node.evaluation.world_views import camera_model, world_cameras
from flashdrive_node.model.errors import InputError
from flashdrive_node.runtime.bag import BagError, messages, open_bag, rig_topics, select
from flashdrive_node.runtime.rig import Rig, RigError, load_rig, parse_rig
from flashdrive_node.runtime.rotation import matrix_from_quaternion, quaternion_from_matrix
from flashdrive_node.world.camera import CAMERAS
from flashdrive_node.world.render import render

RIG = load_rig("sample")
CHOICE = SceneChoice("test", 126, 0.5)
SMALL = PictureSettings(width=64, height=32, samples=1, quality=90)


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "bag"
    write_world_bag(path, RIG, CHOICE, SMALL)
    return path


def contents(path: Path) -> list[tuple[str, int, bytes]]:
    with open_bag(path) as reader:
        return [(c.topic, stamp, bytes(raw)) for c, stamp, raw in messages(reader, reader.connections)]


def decoded(path: Path, topic: str) -> list[tuple[int, Any]]:
    with open_bag(path) as reader:
        wanted = [c for c in reader.connections if c.topic == topic]
        return [(stamp, reader.deserialize(raw, c.msgtype)) for c, stamp, raw in messages(reader, wanted)]


def stamp_of(message: Any) -> int:
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def test_same_arguments_same_messages_in_both_storages(bag: Path, tmp_path: Path) -> None:
    write_world_bag(tmp_path / "same", RIG, CHOICE, SMALL, storage=StoragePlugin.SQLITE3)
    other = dataclasses.replace(CHOICE, index=127)
    write_world_bag(tmp_path / "other", RIG, other, dataclasses.replace(SMALL, width=32, height=16))
    assert contents(tmp_path / "same") == contents(bag)
    assert decoded(tmp_path / "other", RIG.odometry_topic)[5][1].pose != decoded(bag, RIG.odometry_topic)[5][1].pose


def test_holds_every_topic_of_the_rig_at_its_rate(bag: Path) -> None:
    with open_bag(bag) as reader:
        held = {topic: (info.msgtype, info.msgcount) for topic, info in reader.topics.items()}
        assert {c.topic for c in select(reader, RIG)} == set(rig_topics(RIG))
    beside = {"/tf_static": ("tf2_msgs/msg/TFMessage", 1), TRUTH_TOPIC: ("std_msgs/msg/String", 6)}
    assert {topic: held.pop(topic) for topic in beside} == beside
    assert {topic: kind for topic, (kind, _) in held.items()} == {t: kind for t, (kind, _) in rig_topics(RIG).items()}
    assert [held[camera.topic][1] for camera in RIG.cameras] == [6, 6, 6, 6]
    assert held[RIG.odometry_topic][1] == 26


def test_metadata_names_storage_topics_and_qos(bag: Path) -> None:
    about = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    assert (about["version"], about["storage_identifier"], about["compression_mode"]) == (9, "mcap", "")
    profiles = {
        t["topic_metadata"]["name"]: t["topic_metadata"]["offered_qos_profiles"][0]
        for t in about["topics_with_message_count"]
    }
    assert profiles["/tf_static"]["durability"] == "transient_local"
    assert profiles[RIG.reference.topic]["reliability"] == "best_effort"
    assert profiles[RIG.odometry_topic]["reliability"] == "reliable"


def test_pictures_are_those_of_the_world_at_their_stamps(bag: Path) -> None:
    episode = CHOICE.drive()
    for camera in RIG.cameras:
        frames = decoded(bag, camera.topic)
        stamps = np.array([stamp_of(m) for _, m in frames])
        np.testing.assert_array_equal(stamps - START_NS, np.arange(6) * 10**8)
        assert ([recorded for recorded, _ in frames] - stamps == CAMERA_DELAY_NS).all()
        shown = cv2.cvtColor(cv2.imdecode(frames[3][1].data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        view = render(episode.scene, episode.states[3], world_cameras(RIG)[camera.index], 64, 32)
        assert np.abs(shown.astype(int) - view.image[0].numpy()).mean() < 6.0
        # Two pictures of a camera are never the same bytes, whatever stands still.
        assert len({m.data.tobytes() for _, m in frames}) == 6


def test_odometry_is_the_drive_and_the_integral_of_its_twist(bag: Path) -> None:
    table = []
    for _, m in decoded(bag, RIG.odometry_topic):
        p, q = m.pose.pose.position, m.pose.pose.orientation
        table.append((stamp_of(m), p.x, p.y, 2 * np.arctan2(q.z, q.w), m.twist.twist.linear.x, m.twist.twist.angular.z))
    stamp, x, y, yaw, speed, yaw_rate = np.array(table).T
    np.testing.assert_allclose(np.diff(stamp), 2e7)
    middle, step = (yaw[1:] + yaw[:-1]) / 2, (speed[1:] + speed[:-1]) / 2 * 0.02
    np.testing.assert_allclose(np.diff(x), step * np.cos(middle), atol=1e-4)
    np.testing.assert_allclose(np.diff(y), step * np.sin(middle), atol=1e-4)
    np.testing.assert_allclose(np.diff(yaw), (yaw_rate[1:] + yaw_rate[:-1]) / 2 * 0.02, atol=1e-6)
    states = CHOICE.drive().states
    driven = np.array([[float(s.x[0]), float(s.y[0]), float(s.yaw[0]), float(s.speed[0])] for s in states[:6]])
    np.testing.assert_allclose(np.stack((x, y, yaw, speed), axis=1)[::5], driven, atol=1e-9)


def test_calibrations_are_those_of_the_cameras(bag: Path) -> None:
    models = read_calibrations(bag, RIG)
    points = np.array([[12.0, 3.0, 0.0], [30.0, -2.0, 1.0], [8.0, 6.0, 0.5]])
    for spec in RIG.cameras:
        expected = camera_model(world_cameras(RIG)[spec.index], 64, 32)
        assert (models[spec.name].distortion_model, models[spec.name].width) == ("equidistant", 64)
        np.testing.assert_allclose(models[spec.name].project(points), expected.project(points), atol=1e-6)


def test_truth_is_the_expert_s_reason(bag: Path) -> None:
    truth, episode = read_truth(bag), CHOICE.drive()
    assert truth is not None
    assert (truth.split, truth.index) == ("test", 126)
    assert truth.sentences == tuple(episode.sentences(step)[0] for step in range(6))
    assert truth.at(START_NS + 240_000_000) == truth.sentences[2]
    assert truth.at(START_NS + 10**9) is None
    row = json.loads(decoded(bag, TRUTH_TOPIC)[0][1].data)
    assert row.keys() == {
        *("sentence", "cause", "second", "pace", "manoeuvre", "start", "stamp_ns", "split", "index"),
    }


def test_texts_are_scored_against_the_truth() -> None:
    lead, slow = "Follow the car ahead at a safe distance because it is in the lane.", "Slow down for the turn ahead."
    truth = Truth("test", 1, np.array([0, 10**8, 2 * 10**8, 3 * 10**8]), (lead, lead, lead, slow))
    said = [lead, "Decelerate for the slower car ahead to keep the gap.", "Go.", slow]
    records = [{"t0_ns": i * 10**8, "reasoning": text} for i, text in enumerate(said)]
    score = score_reasoning([*records, {"t0_ns": 10**9, "reasoning": lead}], truth)
    assert score is not None
    assert dataclasses.astuple(score) == (4, 0.75, 0.5, 0.25)
    assert score_reasoning([], truth) is None
    assert compare("Go.", None) is None
    assert [label_of(text) for text in (lead, slow, "Go.")] == ["lead", "turn", "unclear"]


def test_a_recording_without_truth_has_none(tmp_path: Path) -> None:
    store = get_typestore(Stores.ROS2_JAZZY)
    text = store.types["std_msgs/msg/String"]
    for name, topic in (("other", "/other"), ("bad", TRUTH_TOPIC)):
        with Writer(tmp_path / name, version=9) as writer:
            connection = writer.add_connection(topic, text.__msgtype__, typestore=store)
            writer.write(connection, 1, store.serialize_cdr(text(data="{}"), text.__msgtype__))
    assert read_truth(tmp_path / "other") is None
    assert read_calibrations(tmp_path / "other", RIG) == {}
    with pytest.raises(BagError, match="must hold JSON of a world's recording"):
        read_truth(tmp_path / "bad")


def test_refuses_what_it_cannot_write(tmp_path: Path, bag: Path) -> None:
    with pytest.raises(FileExistsError, match="new directory"):
        write_world_bag(bag, RIG, CHOICE, SMALL)
    cameras = [
        {"name": "a", "index": 0, "topic": "/a", "transport": "raw", "rate_hz": 10.0},
        {"name": "b", "index": 1, "topic": "/b", "transport": "compressed", "rate_hz": 30.0},
    ]
    rig: Rig = parse_rig({"name": "r", "odometry_topic": "/o", "cameras": cameras}, "test")
    with pytest.raises(RigError, match=r"'a': transport 'compressed' is required(.|\n)*'b': rate_hz 10 is required"):
        write_world_bag(tmp_path / "bag", rig, CHOICE, SMALL)
    assert not (tmp_path / "bag").exists()


def test_quaternions_of_any_rotation() -> None:
    q = np.random.default_rng(0).normal(size=(40, 4))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    half_turns = np.eye(4)[:3]
    for one in (*q, *half_turns, np.array([0.0, 0.0, 0.0, 1.0])):
        rotation = matrix_from_quaternion(one)
        found = quaternion_from_matrix(rotation)
        assert found[3] >= 0
        np.testing.assert_allclose(matrix_from_quaternion(found), rotation, atol=1e-12)


def test_the_most_varied_scene_has_several_causes_by_daylight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varied_scene, "_BATCH", 24)
    tried: list[int] = []
    index = varied_scene.most_varied_scene("test", 40, 60, tried.append)
    assert tried == [24, 40]
    episode = SceneChoice("test", index, 5.9).drive()
    counts = varied_scene.cause_steps(episode)[0]
    assert int((counts >= 5).sum()) >= 2
    assert float(episode.scene.weather.night[0]) < 0.2
    assert not bool(episode.faults.any[0])


def test_scenes_without_a_clear_view_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varied_scene, "_VISIBILITY_MIN_M", 1e6)
    with pytest.raises(InputError, match="none of 5 scenes of split 'test'"):
        varied_scene.most_varied_scene("test", 5, 20)


def test_command_writes_the_bag_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--split", "test", "--index", "126", "--seconds", "0.2", "--size", "32x16", "--samples", "1", "--quiet"]
    assert main(["world", "record", str(tmp_path / "bag"), *options]) == 0
    assert "scene 126 of test, 0.2 s" in capsys.readouterr().out
    assert len(decoded(tmp_path / "bag", RIG.reference.topic)) == 3
    assert main(["world", "record", str(tmp_path / "bag"), *options]) == 2
    assert "new directory is required" in capsys.readouterr().err
    assert main(["world", "record", str(tmp_path / "other"), "--quality", "0"]) == 2
    assert "--quality 1 to 100" in capsys.readouterr().err


def test_every_camera_of_the_world_is_in_the_sample_rig() -> None:
    assert [camera.index for camera in RIG.cameras] == [camera.index for camera in CAMERAS]
