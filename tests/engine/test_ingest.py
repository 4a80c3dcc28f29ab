"""Frames that come ahead of their window: the same answers, whatever comes when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashdrive_node.engine.protocol import CameraFrames, EngineError, Observation, Prediction
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.stream import Stream, StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.sampling import SamplingSettings
from support.stream_windows import Window, frame_features, state, stream_model, tick

CAMERAS = (0, 1, 6)
SIZE = (120, 200)
SETTINGS = StreamingSettings(
    checkpoint=str(Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"),
    device="cpu",
    precision="float32",
    sampling=SamplingSettings(temperature=0, max_length=3),
    cameras=CAMERAS,
    image_size=SIZE,
    flow_steps=2,
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    engine = StreamingEngine(SETTINGS)
    engine.load()
    assert engine.loaded is not None
    return engine.loaded


def picture(camera: int, number: int) -> np.ndarray:
    return np.random.default_rng((camera, number)).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def window(index: int, newest: dict[int, int] | None = None) -> Observation:
    """Window number `index`, in which some cameras' newest frames may be others than the window's number says."""
    cameras = []
    for camera in CAMERAS:
        last = (newest or {}).get(camera, index)
        numbers = range(last - 3, last + 1)
        stamps = tuple(100 * (n + 10) + camera for n in numbers)
        cameras.append(CameraFrames(camera, stamps, tuple(picture(camera, n + 10) for n in numbers)))
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = np.arange(-15, 1) * (0.5 + 0.1 * index)
    return Observation(index, index, tuple(cameras), xyz, np.tile(np.eye(3, dtype=np.float32), (16, 1, 1)))


def ingest(engine: StreamingEngine, observation: Observation, cameras: Sequence[int]) -> None:
    for camera in cameras:
        frames = next(c for c in observation.cameras if c.camera_index == camera)
        engine.ingest(camera, frames.stamps_ns[-1], frames.images[-1])


def assert_same(a: Prediction, b: Prediction) -> None:
    for x, y in zip(a.samples, b.samples, strict=True):
        np.testing.assert_allclose(x.xyz, y.xyz, atol=1e-3)
        assert x.reasoning == y.reasoning


@pytest.mark.parametrize("order", [(0, 1, 6), (6, 1, 0), (1, 6, 0), (0,), (1,), (6, 0)], ids=str)
def test_any_order_of_arrival_gives_the_answer_of_the_whole_window(loaded, order):
    ahead, at_once = StreamingEngine(SETTINGS, loaded), StreamingEngine(SETTINGS, loaded)
    for engine in (ahead, at_once):
        engine.step(window(0))
    for index in (1, 2):
        ingest(ahead, window(index), order)
        found = ahead.step(window(index))
        assert_same(found, at_once.step(window(index)))
    # Cameras that came in front of all others that are missing leave nothing to compute.
    done = next((place for place, camera in enumerate(CAMERAS[:-1]) if camera not in order), len(CAMERAS) - 1)
    assert found.metrics["new_images"] == len(CAMERAS) - done


def test_frames_may_come_before_the_first_window_twice_or_for_nothing(loaded):
    ahead, at_once = StreamingEngine(SETTINGS, loaded), StreamingEngine(SETTINGS, loaded)
    ingest(ahead, window(0), CAMERAS)  # nothing to go on from yet, but encoded
    assert_same(ahead.step(window(0)), at_once.step(window(0)))
    ingest(ahead, window(1), CAMERAS)
    ingest(ahead, window(1), CAMERAS)
    assert_same(ahead.step(window(1)), at_once.step(window(1)))
    # A frame that no window has: its camera's frames were moved for it, and come again as they were.
    ingest(ahead, window(4), (1,))
    assert_same(ahead.step(window(2)), at_once.step(window(2)))
    ahead.reset("anew")
    at_once.reset("anew")
    assert_same(ahead.step(window(3)), at_once.step(window(3)))


def test_windows_that_differ_from_what_came_ahead_are_answered_as_if_nothing_had(loaded):
    ahead, at_once, draw = StreamingEngine(SETTINGS, loaded), StreamingEngine(SETTINGS, loaded), random.Random(0)
    assert_same(ahead.step(window(0)), at_once.step(window(0)))
    for index in (1, 2, 3, 5, 6, 8, 20, 21):  # missed ticks and a gap among them
        ingest(ahead, window(index), draw.sample(CAMERAS, draw.randint(0, 3)))
        lagging = {camera: index - draw.randint(0, 1) for camera in CAMERAS}
        assert_same(ahead.step(window(index, lagging)), at_once.step(window(index, lagging)))


def test_warm_up_takes_frames_ahead_where_they_will_come(loaded):
    engine = StreamingEngine(replace(SETTINGS, frames_ahead=True), loaded)
    computed = []
    step = engine._step

    def noted(observation: Observation) -> Prediction:
        prediction = step(observation)
        computed.append(prediction.metrics["new_images"])
        return prediction

    engine._step = noted  # type: ignore[method-assign]
    engine.warm_up()
    assert computed == [12, 12, 3, 3, 3, 1, 1, 1]


def test_unusable_frames_are_refused_and_the_stream_starts_anew(loaded):
    engine = StreamingEngine(SETTINGS, loaded)
    engine.step(window(0))
    with pytest.raises(EngineError, match=r"frame of camera 1 at 5 ns: .*uint8 is required, found float32"):
        engine.ingest(1, 5, np.zeros((120, 200, 3), np.float32))  # type: ignore[arg-type]
    assert engine.step(window(1)).metrics["new_images"] == 12


def test_stream_ends_in_the_same_state():
    """Keys and values of a window that came camera by camera, against those of one that came at once."""
    ahead, at_once = (Stream(stream_model(0), StreamSettings("kv"), 40) for _ in range(2))
    first, second = (Window({c: tuple(range(k, k + 4)) for c in (0, 2, 5)}, history=k) for k in (1, 2))
    for stream in (ahead, at_once):
        tick(stream, first)
    for camera in (0, 2):
        assert ahead.next_camera == camera
        tokens = second.prompt(ahead.model).images[4 * (0, 2).index(camera)].count
        assert ahead.advance(camera, 5, frame_features(ahead.model, camera, 5, tokens))
    assert not ahead.advance(5, 5, frame_features(ahead.model, 5, 5, 6))  # goes with the text
    with pytest.raises(ValueError, match="camera 5 is required, found 0"):
        ahead.advance(0, 6, frame_features(ahead.model, 0, 6, 4))
    context, logits, plan = tick(ahead, second)
    expected, expected_logits, _ = tick(at_once, second)
    assert plan.encode == (11,)
    for found, wanted in zip((logits, *state(context)), (expected_logits, *state(expected)), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-4, atol=2e-5)
