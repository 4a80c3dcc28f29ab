"""PhysicalAI clips through the dataset's own package, on a small dataset in its layout."""

import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from flashdrive_node.evaluation.clip import ClipError
from flashdrive_node.evaluation.physical_ai import PhysicalAIClips
from flashdrive_node.model.errors import InputError
from support.physical_ai_dataset import FIRST_US, FRAME_US, SPEED, TURN, newest_frame, shade, write_dataset

CLIPS = ["25cd4769-5dcf-4b53-a351-bf2c5deb6124", "ff00aa11-0000-4b53-a351-bf2c5deb6124"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("physical_ai") / "data", CLIPS)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refused)


def test_windows_of_the_protocol(dataset: Path) -> None:
    source = PhysicalAIClips(dataset, [CLIPS[1]], windows=22)
    clip = next(source.clips())
    windows = list(clip.windows)
    assert (clip.name, len(source), len(windows)) == (CLIPS[1], 1, 22)
    for number, window in enumerate(windows):
        seen, t0_us = window.observation, 1_700_000 + 100_000 * number
        assert (seen.window_id, seen.t0_ns) == (number, t0_us * 1000)
        assert [camera.camera_index for camera in seen.cameras] == [0, 1, 2, 6]
        frames = [newest_frame(t0_us - 100_000 * k) for k in (3, 2, 1, 0)]
        for camera in seen.cameras:
            assert camera.stamps_ns == tuple(1000 * (FIRST_US + FRAME_US * f) for f in frames)
            assert max(camera.stamps_ns) <= seen.t0_ns
            for picture, frame in zip(camera.images, frames, strict=True):
                assert picture.shape == (48, 64, 3)
                assert abs(float(picture.mean()) - shade(frame)) < 3
        np.testing.assert_allclose(seen.ego_history_xyz[-1], 0, atol=1e-6)
        np.testing.assert_allclose(seen.ego_history_xyz[-2], [-SPEED * 0.1, 0.0, 0.0], atol=0.01)
        np.testing.assert_allclose(seen.ego_history_rot[-1], np.eye(3), atol=1e-6)
        assert window.truth is not None
        turned = TURN * 0.1 * np.arange(1, 65)
        radius = SPEED / TURN
        circled = np.stack([radius * np.sin(turned), radius * (1 - np.cos(turned)), np.zeros(64)], axis=1)
        np.testing.assert_allclose(window.truth.xyz, circled, atol=1e-3)
        np.testing.assert_allclose(window.truth.yaw, turned, atol=1e-5)


def test_the_last_window_of_the_protocol_has_its_future(dataset: Path) -> None:
    source = PhysicalAIClips(dataset, CLIPS[:1])
    windows = list(next(source.clips()).windows)
    assert len(windows) == 120
    assert windows[-1].observation.t0_ns == 13_600_000_000
    assert all(window.truth is not None for window in windows)


def test_clips_that_are_there_are_found(dataset: Path, tmp_path: Path) -> None:
    assert PhysicalAIClips(dataset).clip_ids == CLIPS
    cache = tmp_path / "datasets--nvidia--PhysicalAI-Autonomous-Vehicles" / "snapshots" / "0123abcd"
    shutil.copytree(dataset, cache)
    assert PhysicalAIClips(tmp_path).clip_ids == CLIPS
    (cache / "labels" / "egomotion" / "egomotion.chunk_0000.zip").unlink()
    with pytest.raises(InputError, match=r"clips with .*egomotion are required, found none"):
        PhysicalAIClips(tmp_path)
    with pytest.raises(ClipError, match="FileNotFoundError"):
        list(next(PhysicalAIClips(tmp_path, CLIPS[:1]).clips()).windows)


def test_truth_ends_with_the_motion(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "short", CLIPS[:1], seconds=3.0, motion_seconds=8.25)
    windows = list(next(PhysicalAIClips(root, windows=4).clips()).windows)
    assert [window.truth is not None for window in windows] == [True, True, False, False]


def test_missing_frames_end_a_clip(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "gap", CLIPS[:1], gap_at=70)
    source = PhysicalAIClips(root, windows=30)
    windows = []
    with pytest.raises(ClipError, match=r"camera_cross_left_120fov: a frame within 100 ms before .* ms old"):
        windows.extend(next(source.clips()).windows)


@pytest.mark.parametrize("damage", ["features.csv", "metadata/feature_presence.parquet"])
def test_incomplete_copies_are_refused(dataset: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "copy"
    shutil.copytree(dataset, root)
    (root / damage).unlink()
    with pytest.raises(InputError, match="its index cannot be read"):
        PhysicalAIClips(root)


def test_other_directories_and_unknown_clips(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a copy of nvidia/PhysicalAI-Autonomous-Vehicles with clip_index\.parquet"):
        PhysicalAIClips(tmp_path)
    with pytest.raises(InputError, match="clips of the index are required, found nowhere"):
        PhysicalAIClips(dataset, ["nowhere"])
    with pytest.raises(InputError, match="clips of 1 window or more"):
        PhysicalAIClips(dataset, windows=0)
