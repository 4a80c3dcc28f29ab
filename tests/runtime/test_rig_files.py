"""Rigs: those that ship, and everything that can be wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flashdrive_node.runtime.rig import CAMERA_INDICES, RigError, available_rigs, load_rig, parse_rig, share_directory

GOOD = {
    "name": "mine",
    "odometry_topic": "/odometry",
    "cameras": [
        {"name": "tele", "index": 6, "topic": "/tele", "rate_hz": 30},
        {
            "name": "front",
            "index": 1,
            "topic": "/front",
            "rate_hz": 30,
            "transport": "raw",
            "width": 640,
            "height": 480,
        },
    ],
}


def test_shipped_rigs() -> None:
    assert available_rigs() == ["autoware", "physical_ai", "sample"]
    for name in available_rigs():
        rig = load_rig(name)
        assert rig.name == name
        assert [camera.index for camera in rig.cameras] == [0, 1, 2, 6]
        assert [camera.name for camera in rig.cameras] == ["cross_left", "front_wide", "cross_right", "front_tele"]
        assert rig.reference.index == 1
        assert rig.navigation_topic is not None
    physical = load_rig("physical_ai")
    assert {(camera.rate_hz, camera.width, camera.height) for camera in physical.cameras} == {(30.0, 1920, 1080)}
    by_name = {camera.topic.split("/")[1]: camera.index for camera in physical.cameras}
    assert by_name.items() <= CAMERA_INDICES.items()
    assert load_rig("autoware").odometry_topic == "/localization/kinematic_state"
    assert all("/image_raw/compressed" in camera.topic for camera in load_rig("autoware").cameras)


def test_rig_of_a_path_sorts_and_fills_in_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"vehicle": {"width_m": 2.5, "rear_overhang_m": 0.8}}))
    rig = load_rig(path)
    assert [camera.name for camera in rig.cameras] == ["front", "tele"]
    assert rig.cameras[0].transport == "raw"
    assert (rig.cameras[1].transport, rig.cameras[1].width) == ("compressed", None)
    assert (rig.base_frame, rig.navigation_topic) == ("base_link", None)
    assert (rig.vehicle_width_m, rig.rear_overhang_m, rig.vehicle_length_m) == (2.5, 0.8, 4.8)
    assert rig.camera(6).name == "tele"
    with pytest.raises(KeyError, match=r"has cameras \[1, 6\], not 0"):
        rig.camera(0)


def test_slowest_camera_is_the_reference() -> None:
    cameras = [{"name": f"c{i}", "index": i, "topic": f"/{i}", "rate_hz": rate} for i, rate in enumerate((30, 30, 10))]
    assert parse_rig(GOOD | {"cameras": cameras}, "test").reference.index == 2
    assert parse_rig(GOOD | {"cameras": cameras[:2]}, "test").reference.index == 1
    assert parse_rig(GOOD | {"cameras": cameras[:1]}, "test").reference.index == 0


def test_all_problems_at_once() -> None:
    document = {
        "odometry_topic": 5,
        "colour": "red",
        "vehicle": {"width_m": -1, "mass": 3},
        "cameras": [
            {"name": "1st", "index": 9, "topic": "/a", "rate_hz": 500, "transport": "h264"},
            {"name": "b", "index": 1, "topic": "/b", "rate_hz": "fast", "width": 10, "max_bytes": 0},
            {"name": "b", "index": 1, "topic": "/b", "rate_hz": 10, "lens": "wide"},
            "front",
        ],
    }
    with pytest.raises(RigError) as caught:
        parse_rig(document, "mine.yaml")
    text = str(caught.value)
    assert text.startswith(f"mine.yaml: {len(caught.value.problems)} problem(s)")
    for part in (
        "key 'name' is required (text), found None",
        "key 'odometry_topic' is required (text), found 5",
        "key 'colour' is unknown",
        "key 'vehicle.width_m' must be a number above 0, found -1",
        "key 'vehicle.mass' is unknown",
        "key 'cameras[0].name' must be a ROS name (letters, digits, _), found '1st'",
        "key 'cameras[0].index' must be an integer 0 to 6, found 9",
        "key 'cameras[0].rate_hz' must be 5 to 120 Hz, found 500",
        "key 'cameras[0].transport' must be one of ('compressed', 'raw'), found 'h264'",
        "key 'cameras[1].rate_hz' must be a number above 0, found 'fast'",
        "keys 'cameras[1].width' and 'height' must be given together",
        "key 'cameras[1].max_bytes' must be an integer above 0, found 0",
        "key 'cameras[2].lens' is unknown",
        "cameras[3] must be a mapping, found str",
        "cameras: index 1 stands 2 times, must be unique",
        "cameras: topic '/b' stands 2 times, must be unique",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not YAML"),
        (b"- 1", "the file must be a mapping, found list"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"name: x\ncameras: []", "must be a list of at least one camera"),
    ],
)
def test_files_that_are_no_rig(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rig.yaml"
    path.write_bytes(content)
    with pytest.raises(RigError, match=message):
        load_rig(path)


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RigError, match="no rig of this name; there are autoware, physical_ai, sample"):
        load_rig("mine")
    with pytest.raises(RigError, match="cannot be read"):
        load_rig(tmp_path / "missing.yaml")


def test_share_directory_prefers_a_ros_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"{tmp_path / 'other'}:{tmp_path}")
    assert share_directory() != tmp_path
    (tmp_path / "share" / "flashdrive_node" / "params" / "rigs").mkdir(parents=True)
    assert share_directory() == tmp_path / "share" / "flashdrive_node"
