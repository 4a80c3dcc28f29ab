"""Clips of the world: the expert's own drive, window by window."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flashdrive_node.evaluation import world_clips
from flashdrive_node.evaluation.world_clips import WorldClips
from flashdrive_node.model.errors import InputError
from flashdrive_node.world.camera import CAMERAS
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import Episode, record
from flashdrive_node.world.render import View, render
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import Scene, select
from flashdrive_node.world.state import State

SIZE = (16, 32)


def test_windows_are_the_drive() -> None:
    source = WorldClips("test", range(3, 5), windows=3, size=SIZE)
    clips = {clip.name: list(clip.windows) for clip in source.clips()}
    assert list(clips) == ["test-000003", "test-000004"]
    assert len(source) == 2
    assert source.name == "world test:3-4"
    episode = record(sample_scenes(scene_keys("test", [3, 4])), 83)
    for number, window in enumerate(clips["test-000004"]):
        step, seen, truth = 17 + number, window.observation, window.truth
        assert seen.t0_ns == step * 100_000_000
        assert [camera.camera_index for camera in seen.cameras] == [0, 1, 2, 6]
        for camera in seen.cameras:
            assert camera.stamps_ns == tuple((step - k) * 100_000_000 for k in (3, 2, 1, 0))
        assert truth is not None
        np.testing.assert_array_equal(truth.xyz, episode.future(step)[0][1].numpy())
        np.testing.assert_array_equal(seen.ego_history_xyz, episode.history(step)[0][1].numpy())
        assert truth.sentence == episode.sentences(step)[1]
        assert seen.nav_text == episode.navigation(step)[1]
    # Frames that windows share are rendered once; the last one is what the camera sees then.
    first, second = clips["test-000004"][:2]
    front = first.observation.cameras[1]
    np.testing.assert_array_equal(front.images[3], second.observation.cameras[1].images[2])
    row = torch.tensor([1])
    view = render(select(episode.scene, row), select(episode.states[17], row), CAMERAS[1], SIZE[1], SIZE[0])
    np.testing.assert_array_equal(front.images[3], view.image[0].numpy())


def test_two_passes_are_equal() -> None:
    source = WorldClips("validation", range(1), windows=1, size=SIZE)
    one, two = (next(next(source.clips()).windows) for _ in range(2))
    for a, b in zip(one.observation.cameras, two.observation.cameras, strict=True):
        np.testing.assert_array_equal(a.images, b.images)


def test_pictures_are_made_as_windows_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(scene: Scene, state: State, *args: Any, **options: Any) -> View:
        made.append(len(state.x))
        return render(scene, state, *args, **options)

    monkeypatch.setattr(world_clips, "render", counted)
    windows = next(WorldClips("validation", range(1), windows=12, size=SIZE).clips()).windows
    next(windows)
    assert made == [4] * 4
    whole = list(windows)
    assert len(whole) == 11
    assert made == [4] * 4 + [8] * 4 + [3] * 4

    made.clear()
    first, *some = next(WorldClips("validation", range(1), windows=12, size=SIZE).clips()).every(5)
    assert first.observation.window_id == 0
    assert made == [4] * 4 + [8] * 4
    for window, same in zip(some, (whole[4], whole[9]), strict=True):
        assert window.observation.t0_ns == same.observation.t0_ns
        for camera, other in zip(window.observation.cameras, same.observation.cameras, strict=True):
            assert camera.stamps_ns == other.stamps_ns
            np.testing.assert_array_equal(camera.images, other.images)


def test_scenes_that_the_expert_does_not_master_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_in_the_second(scene: Scene, steps: int) -> Episode:
        episode = record(scene, steps)
        fault = torch.tensor([False, True, False])
        return replace(episode, faults=episode.faults._replace(off_road=fault))

    monkeypatch.setattr(world_clips, "record", wrong_in_the_second)
    clips = [(clip.notes, len(list(clip.windows))) for clip in WorldClips("test", range(3), 1, SIZE).clips()]
    assert clips == [([], 1), (["left out: the expert itself is at fault in this scene"], 0), ([], 1)]


@pytest.mark.parametrize("change", [{"split": "exam"}, {"windows": 0}, {"size": (16, 30)}, {"size": (4, 32)}])
def test_bad_requests(change: dict) -> None:
    with pytest.raises(InputError, match="are required, found"):
        WorldClips(**({"split": "test", "indices": range(1)} | change))


def test_pictures_are_compiled_on_gpus_alone() -> None:
    given = {device: WorldClips("test", range(1), device=device).compiled for device in ("cpu", "cuda", "cuda:1")}
    assert given == {"cpu": False, "cuda": True, "cuda:1": True}
    assert not WorldClips("test", range(1), device="cuda", compiled=False).compiled
