"""What the package carries: small enough, whole, and what its documentation says."""

from argparse import Namespace
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdrive_node import bundled
from flashdrive_node.bundled import BUNDLED, bundled_checkpoint, bundled_drive
from flashdrive_node.cli.demo import engine_parameters
from flashdrive_node.cli.engine_options import overlay_of
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.bag_calibration import read_calibrations
from flashdrive_node.evaluation.bag_clips import BagClips
from flashdrive_node.evaluation.bag_truth import read_truth
from flashdrive_node.evaluation.driven_route import DrivenRoute
from flashdrive_node.evaluation.policies import history_file
from flashdrive_node.evaluation.sabotage import BlankedEngine
from flashdrive_node.evaluation.truth import compare, label_of
from flashdrive_node.evaluation.world_bag import SceneChoice, truth
from flashdrive_node.model.config import ALPAMAYO_1_5
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.model.presets import alpamayo_1_5_10b
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.runtime.bag import messages, odometry_sample, open_bag, rig_topics, select
from flashdrive_node.runtime.rig import Rig

_MIB = 1 << 20


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_drive_is_small_and_holds_everything_for_its_length(rig: Rig) -> None:
    assert size(bundled_drive()) <= 8 * _MIB
    with open_bag(bundled_drive()) as reader:
        assert {c.topic for c in select(reader, rig)} == set(rig_topics(rig))
        counts = {topic: info.msgcount for topic, info in reader.topics.items()}
        assert reader.duration == pytest.approx(20e9, rel=0.01)
    assert [counts[camera.topic] for camera in rig.cameras] == [201] * 4
    assert counts[rig.odometry_topic] == 1001
    assert counts[str(rig.navigation_topic)] == 21
    assert read_calibrations(bundled_drive(), rig).keys() == {camera.name for camera in rig.cameras}


def test_the_drive_is_an_unseen_scene_with_several_causes() -> None:
    known = read_truth(bundled_drive())
    assert known is not None
    assert known.split == "test"
    seconds = {label: count / 10 for label, count in Counter(map(label_of, known.sentences)).items()}
    assert "unclear" not in seconds
    assert sum(value >= 2.0 for value in seconds.values()) >= 4


def test_the_drive_is_what_the_world_gives(rig: Rig) -> None:
    known = read_truth(bundled_drive())
    assert known is not None
    # A change of the world that would change this scene makes the recording stale.
    episode = SceneChoice(known.split, known.index, 20.0).drive()
    assert not bool(episode.faults.any[0])
    assert known.sentences == tuple(truth(episode, step)["sentence"] for step in range(201))
    with open_bag(bundled_drive()) as reader:
        wanted = [c for c in reader.connections if c.topic == rig.odometry_topic]
        route = DrivenRoute(
            [odometry_sample(reader.deserialize(raw, c.msgtype)) for c, _, raw in messages(reader, wanted)]
        )
    driven = route.future(int(known.stamps_ns[100]))
    assert driven is not None
    np.testing.assert_allclose(driven.xyz, episode.future(100)[0][0], atol=0.02)


def test_the_checkpoint_is_small_whole_and_in_the_release_s_format() -> None:
    folder = bundled_checkpoint()
    files = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sum(files.values()) <= 24 * _MIB
    assert max(files.values()) <= 15 * _MIB
    loaded = load_alpamayo(BUNDLED, torch.device("cpu"), torch.float32, hash_files=False)
    config = loaded.model.config
    assert config.model_type == ALPAMAYO_1_5
    assert config.raw.keys() - {"dtype", "vlm_name_or_path"} <= alpamayo_1_5_10b().raw.keys()
    assert history_file(BUNDLED) == folder / "history_baseline.safetensors"


def test_the_model_plans_the_bundled_drive(rig: Rig) -> None:
    """Paths follow the road and texts name what there is, at moments of every kind."""
    known = read_truth(bundled_drive())
    assert known is not None
    settings = PlainSettings(BUNDLED, device="cpu", sampling=SamplingSettings(temperature=0.0))
    engine = PlainEngine(settings)
    engine.load()
    clip = next(BagClips([bundled_drive()], rig).clips())
    errors, right = [], []
    for window in islice(clip.windows, 5, 111, 35):  # free road, slower car, oncoming traffic, turn
        prediction = engine.step(window.observation)
        assert window.truth is not None
        distance = prediction.trajectory.xyz[:, :2] - window.truth.xyz[:, :2]
        errors.append(float(np.linalg.norm(distance, axis=1).mean()))
        verdict = compare(prediction.trajectory.reasoning, known.at(window.observation.t0_ns))
        assert verdict is not None
        right.append(verdict[0])
        assert not verdict[2], prediction.trajectory.reasoning
    assert len(errors) == 4
    assert np.mean(errors) < 1.5
    assert np.mean(right) >= 0.75


def test_a_stream_that_loses_its_cache_drives_clearly_worse(rig: Rig) -> None:
    settings = StreamingSettings(
        BUNDLED, device="cpu", sampling=SamplingSettings(temperature=0.0, max_length=32), stream=StreamSettings("kv")
    )
    engines = [StreamingEngine(settings), BlankedEngine(settings)]
    engines[0].load()
    engines[1].loaded = engines[0].loaded
    windows = list(islice(next(BagClips([bundled_drive()], rig).clips()).windows, 59))
    errors: list[list[float]] = [[], []]
    for first in (3, 48, 57):  # free road, oncoming traffic, turn
        for engine, met in zip(engines, errors, strict=True):
            engine.reset("another moment")
            # The first window is computed whole, the second reads what was kept of it, or nothing.
            window, prediction = windows[first + 1], [engine.step(w.observation) for w in windows[first : first + 2]][1]
            assert window.truth is not None
            distance = prediction.trajectory.xyz[:, :2] - window.truth.xyz[:, :2]
            met.append(float(np.linalg.norm(distance, axis=1).mean()))
    kept, lost = errors
    assert all(b > a for a, b in zip(kept, lost, strict=True))
    assert np.mean(lost) > 2 * np.mean(kept)


def test_what_the_demo_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exact engine for checkpoints that have nothing for streams, and all that is there for the bundled one."""
    plain = {"engine": "streaming", "checkpoint": "other", "stream_mode": "features"}
    assert engine_parameters("other") == plain
    monkeypatch.setattr(bundled, "_DATA", tmp_path)
    assert engine_parameters(BUNDLED) == plain | {"checkpoint": BUNDLED}
    named = Namespace(overlay=Path(BUNDLED))
    with pytest.raises(InputError, match="--overlay: a path is required, found 'bundled'"):
        overlay_of(named)
    drafter, overlay = (tmp_path / "alpamayo_small" / name for name in ("drafter", "streaming/expert.safetensors"))
    drafter.mkdir(parents=True)
    overlay.parent.mkdir()
    overlay.write_bytes(b"")
    found = engine_parameters(BUNDLED)
    assert found["stream_mode"] == "kv"
    assert (found["overlay"], found["drafter"]) == (str(overlay), str(drafter))
    assert overlay_of(named) == overlay
