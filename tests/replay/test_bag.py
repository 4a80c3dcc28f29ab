"""What is said about recordings that cannot be played."""

import shutil
from pathlib import Path

import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from flashdrive_node.runtime.bag import BagError, definition, messages, open_bag, select
from flashdrive_node.runtime.rig import Rig, load_rig


def damaged(drive: Path, folder: Path, content: bytes) -> Path:
    path = folder / "damaged"
    shutil.copytree(drive, path)
    next(path.glob("*.mcap")).write_bytes(content)
    return path


def read_all(path: Path) -> int:
    with open_bag(path) as reader:
        return sum(1 for _ in messages(reader, reader.connections))


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="nope: a rosbag2 directory or file is required, found nothing"):
        read_all(tmp_path / "nope")


def test_directory_without_metadata(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no bag")
    with pytest.raises(BagError, match=r"metadata\.yaml is required, found \['notes\.txt'\]"):
        read_all(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_file(tmp_path: Path, drive: Path, share: float) -> None:
    content = next(drive.glob("*.mcap")).read_bytes()
    with pytest.raises(BagError, match="not a readable rosbag2 recording"):
        read_all(damaged(drive, tmp_path, content[: int(len(content) * share)]))


def test_damage_in_the_middle_says_where(tmp_path: Path, drive: Path) -> None:
    content = bytearray(next(drive.glob("*.mcap")).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = b"\xff" * 4000
    with pytest.raises(BagError, match=r"damaged after \d\.\d+ s of 4\.\d+ s"):
        read_all(damaged(drive, tmp_path, bytes(content)))


def test_other_files(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG")
    with pytest.raises(BagError, match="not a readable rosbag2 recording"):
        read_all(picture)


@pytest.mark.parametrize("storage", list(StoragePlugin))
def test_recording_without_messages(tmp_path: Path, storage: StoragePlugin) -> None:
    with Writer(tmp_path / "bag", version=9, storage_plugin=storage) as writer:
        writer.add_connection("/odometry", "nav_msgs/msg/Odometry", typestore=get_typestore(Stores.ROS2_JAZZY))
    with pytest.raises(BagError, match="messages is required, found none"):
        read_all(tmp_path / "bag")


def test_single_file_is_enough(drive: Path) -> None:
    assert read_all(next(drive.glob("*.mcap"))) == read_all(drive) > 500


def test_a_rig_that_does_not_fit_lists_all_that_is_missing_and_what_there_is(drive: Path) -> None:
    with open_bag(drive) as reader, pytest.raises(BagError) as caught:
        select(reader, load_rig("autoware"))
    text = str(caught.value)
    assert text.count("is required, found no such topic") == 5
    assert "/localization/kinematic_state (nav_msgs/msg/Odometry)" in text
    assert "/camera/front_wide/image/compressed (sensor_msgs/msg/CompressedImage, 41)" in text


def test_wrong_types_and_empty_topics_are_said_together(tmp_path: Path, rig: Rig) -> None:
    store = get_typestore(Stores.ROS2_JAZZY)
    with Writer(tmp_path / "bag", version=9) as writer:
        writer.add_connection(rig.cameras[0].topic, "sensor_msgs/msg/CompressedImage", typestore=store)
        writer.add_connection(rig.cameras[1].topic, "sensor_msgs/msg/Image", typestore=store)
        text = writer.add_connection(rig.odometry_topic, "std_msgs/msg/String", typestore=store)
        image = store.types["std_msgs/msg/String"](data="x")
        writer.write(text, 1, store.serialize_cdr(image, "std_msgs/msg/String"))
    with open_bag(tmp_path / "bag") as reader, pytest.raises(BagError) as caught:
        select(reader, rig)
    said = str(caught.value)
    assert f"{rig.cameras[0].topic} (sensor_msgs/msg/CompressedImage) is required, found it empty" in said
    assert f"{rig.odometry_topic} must be nav_msgs/msg/Odometry, found std_msgs/msg/String" in said
    assert f"{rig.cameras[2].topic} (sensor_msgs/msg/CompressedImage) is required, found no such topic" in said


def test_definitions_come_from_jazzy_or_from_an_installed_package(tmp_path: Path) -> None:
    text, digest = definition("nav_msgs/msg/Path")
    assert "geometry_msgs/PoseStamped[] poses" in text
    assert digest == "RIHS01_1957a5bb3cee5da65c4e52e52b65a93df227efce4c20f8458b36e73066ca334b"
    folder = tmp_path / "my_msgs" / "msg"
    folder.mkdir(parents=True)
    (folder / "Outer.msg").write_text("std_msgs/Header header\nmy_msgs/Inner[] parts\n")
    (folder / "Inner.msg").write_text("float64 value\n")
    text, digest = definition("my_msgs/msg/Outer", [tmp_path])
    assert "my_msgs/Inner[] parts" in text
    assert "float64 value" in text
    assert digest.startswith("RIHS01_")
    with pytest.raises(BagError, match="no definition of my_msgs/msg/Absent"):
        definition("my_msgs/msg/Absent", [tmp_path])
