"""Observations with one thing wrong, and everything else as it was."""

from dataclasses import replace

import numpy as np
import pytest

from flashdrive_node.engine.protocol import CameraFrames
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.evaluation.sabotage import KINDS, BlankedEngine, SabotagedClips, sabotaged
from flashdrive_node.evaluation.world_clips import WorldClips
from flashdrive_node.model.errors import InputError


@pytest.fixture(scope="module")
def source() -> WorldClips:
    return WorldClips("test", range(2), windows=1, size=(16, 32))


def test_one_thing_is_wrong(source) -> None:
    window = next(next(source.clips()).windows)
    seen = window.observation
    for kind in KINDS:
        clip = next(SabotagedClips(source, kind).clips())
        lied = next(clip.windows)
        assert clip.name == "test-000000"
        assert lied.truth is not None
        np.testing.assert_array_equal(lied.truth.xyz, window.truth.xyz)
        same_history = np.array_equal(lied.observation.ego_history_xyz, seen.ego_history_xyz)
        assert same_history == (kind != "history")
        for a, b in zip(lied.observation.cameras, seen.cameras, strict=True):
            assert (a.camera_index, a.stamps_ns) == (b.camera_index, b.stamps_ns)
            assert np.array_equal(a.images, b.images) == (kind in ("history", "cache"))
    exchanged = sabotaged(seen, "cameras").cameras
    for a, b in zip(exchanged, (*seen.cameras[1:], seen.cameras[0]), strict=True):
        np.testing.assert_array_equal(a.images, b.images)
    assert not sabotaged(seen, "history").ego_history_xyz.any()
    assert SabotagedClips(source, "blind").name == "world test:0-1, sabotaged: blind"
    assert len(SabotagedClips(source, "blind")) == 2


def test_a_cache_is_lost_only_where_one_is_kept() -> None:
    for settings in (PlainSettings("none"), StreamingSettings("none", stream=StreamSettings("features"))):
        with pytest.raises(InputError, match="--engine streaming --stream-mode kv is required"):
            BlankedEngine(settings)


def test_what_cannot_be_exchanged(source) -> None:
    seen = next(next(source.clips()).windows).observation
    small = CameraFrames(0, seen.cameras[0].stamps_ns, tuple(i[:8] for i in seen.cameras[0].images))
    with pytest.raises(InputError, match="cameras of one size"):
        sabotaged(replace(seen, cameras=(small, *seen.cameras[1:])), "cameras")
    with pytest.raises(InputError, match="--sabotage must be one of"):
        SabotagedClips(source, "nothing")
