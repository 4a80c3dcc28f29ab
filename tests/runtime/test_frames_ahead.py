"""Frames that the engine takes ahead of their window: which, when, and that nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashdrive_node.engine.fake import FakeEngine, FakeSettings
from flashdrive_node.engine.protocol import CameraFrames, EngineError, Observation, Prediction
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.runtime.frames_ahead import FrameAhead, FramesAhead
from flashdrive_node.runtime.outcome import Outcome
from flashdrive_node.runtime.pipeline_settings import PipelineSettings
from flashdrive_node.runtime.worker import EngineWorker
from support.pipeline_drive import CAMERAS, Drive
from support.worker_bench import Bench, Engine

PICTURE = np.zeros((2, 2, 3), np.uint8)
EYE = np.tile(np.eye(3, dtype=np.float32), (16, 1, 1))


def observation(window_id: int, cameras: tuple[int, ...] = (0, 6)) -> Observation:
    """Window k with stamps up to k."""
    stamps = tuple(range(window_id - 3, window_id + 1))
    frames = tuple(CameraFrames(camera, stamps, (PICTURE,) * 4) for camera in cameras)
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = np.arange(-15, 1) * 0.5
    return Observation(window_id, window_id, frames, xyz, EYE)


class Taking(Engine):
    """Takes frames; `gate` holds it up in the middle of one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.refusing = False

    def ingest(self, camera_index: int, stamp_ns: int, image: np.ndarray) -> None:
        self.note(f"frame {camera_index} {stamp_ns}")
        assert self.gate.wait(10)
        if self.refusing:
            raise EngineError("no such picture")


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(Taking()).start()
    bench.engine.calls.clear()
    yield bench
    bench.engine.release()
    assert bench.worker.close()
    assert bench.engine.threads == {"engine"}


def taken(bench: Bench, call: str) -> None:
    bench.wait(lambda: call in bench.engine.calls)


def test_one_frame_of_each_camera_is_given_out_ahead_of_a_window() -> None:
    frames = FramesAhead()

    def add(camera: int, stamp_ns: int) -> bool:
        return frames.add(FrameAhead(camera, stamp_ns, PICTURE, 0))

    assert add(6, 5)
    assert add(0, 5)
    assert not add(0, 4)  # late
    assert [(f.camera_index, f.stamp_ns) for f in (frames.pop(), frames.pop())] == [(6, 5), (0, 5)]
    assert add(6, 6)  # of the window after
    assert not frames.pending()
    frames.expect(observation(5))
    assert not add(0, 5)
    frames.begin()
    assert (frames.pop().stamp_ns, frames.pending()) == (6, False)
    assert add(0, 7)
    frames.expect(observation(7))
    frames.begin()
    assert not frames.pending()  # the window has brought it
    frames.clear()
    assert add(0, 1)


def test_frames_are_taken_between_windows_and_a_waiting_window_comes_first(bench: Bench) -> None:
    engine, worker = bench.engine, bench.worker
    assert isinstance(engine, Taking)
    assert worker.ingest(0, 4, PICTURE)
    taken(bench, "frame 0 4")
    engine.gate.clear()
    assert worker.ingest(6, 4, PICTURE)
    taken(bench, "frame 6 4")
    # Meanwhile the window comes, a frame of the next one, and one that the window has.
    assert worker.submit(observation(4))
    assert worker.ingest(0, 5, PICTURE)
    assert not worker.ingest(0, 4, PICTURE)
    engine.gate.set()
    taken(bench, "frame 0 5")
    assert engine.calls == ["frame 0 4", "frame 6 4", "step 4", "frame 0 5"]
    bench.wait(lambda: worker.status().counts.get("frames_ahead") == 3)
    assert bench.kinds() == [(4, "result")]
    assert bench.states[-1] == "ready"


def test_a_reset_forgets_frames_and_reaches_the_engine_before_the_next(bench: Bench) -> None:
    engine, worker = bench.engine, bench.worker
    assert isinstance(engine, Taking)
    engine.gate.clear()
    assert worker.ingest(0, 4, PICTURE)
    taken(bench, "frame 0 4")
    assert worker.ingest(6, 4, PICTURE)
    worker.reset("gap")
    assert worker.ingest(6, 1, PICTURE)  # stamps may start anew
    engine.gate.set()
    taken(bench, "frame 6 1")
    assert engine.calls == ["frame 0 4", "reset gap", "frame 6 1"]
    bench.step(9)
    assert engine.calls[-1] == "step 9"


def test_a_frame_that_cannot_be_used_costs_no_window(bench: Bench) -> None:
    engine, worker = bench.engine, bench.worker
    assert isinstance(engine, Taking)
    engine.refusing = True
    assert worker.ingest(0, 4, PICTURE)
    taken(bench, "reset after EngineError")
    engine.refusing = False
    assert bench.step(4).kind == "result"
    assert worker.status().consecutive_failures == 0
    assert "no such picture" in worker.status().last_error


def test_a_frame_that_takes_too_long_shows_as_hanging() -> None:
    bench = Bench(Taking(), hang_timeout_s=0.02).start()
    assert isinstance(bench.engine, Taking)
    bench.engine.gate.clear()
    assert bench.worker.ingest(0, 4, PICTURE)
    bench.wait(lambda: bench.worker.status().hanging)
    bench.engine.gate.set()
    bench.wait(lambda: not bench.worker.status().hanging)
    assert bench.worker.close()


def test_an_engine_that_takes_none_is_offered_none() -> None:
    bench = Bench().start()
    assert not bench.worker.ingest(0, 4, PICTURE)
    assert bench.worker.close()


class Noting(FakeEngine):
    """Notes which frames and which windows came."""

    def __init__(self) -> None:
        super().__init__(FakeSettings(latency_s=0.0))
        self.came: list[tuple[int, int] | int] = []

    def ingest(self, camera_index: int, stamp_ns: int, image: np.ndarray) -> None:
        assert image.shape == (48, 64, 3)
        self.came.append((camera_index, stamp_ns))

    def step(self, observation: Observation) -> Prediction:
        self.came.append(observation.t0_ns)
        return super().step(observation)


def test_the_pipeline_offers_frames_as_they_are_decoded() -> None:
    engine = Noting()
    drive = Drive(PipelineSettings(ingest=True), engine=engine)
    drive.run(20)
    windows = [t0 for t0 in engine.came if isinstance(t0, int)]
    assert len(windows) == len(drive.results()) == 5
    for t0_ns in windows[1:]:
        behind = engine.came[: engine.came.index(t0_ns)]
        ahead = [frame for frame in behind if isinstance(frame, tuple) and frame[1] == t0_ns]
        # Those of a window that is complete come with it; never one twice, none behind its window.
        assert len(set(ahead)) == len(ahead) <= len(CAMERAS)
        assert not [f for f in engine.came[len(behind) :] if isinstance(f, tuple) and f[1] <= t0_ns]
    assert any(isinstance(frame, tuple) for frame in engine.came)
    assert drive.pipeline.close()
    drive.assert_accounts()


def test_answers_of_the_streaming_engine_are_the_same() -> None:
    settings = StreamingSettings(
        checkpoint=str(Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"),
        device="cpu",
        precision="float32",
        sampling=SamplingSettings(temperature=0, max_length=3),
        cameras=(0, 6),
        image_size=(120, 200),
        flow_steps=2,
        stream=StreamSettings("kv"),
    )

    def picture(camera: int, stamp: int) -> np.ndarray:
        return np.random.default_rng((camera, stamp + 9)).integers(0, 256, (120, 200, 3), dtype=np.uint8)

    def window(k: int) -> Observation:
        drawn = observation(k)
        cameras = tuple(
            replace(c, images=tuple(picture(c.camera_index, stamp) for stamp in c.stamps_ns)) for c in drawn.cameras
        )
        return replace(drawn, cameras=cameras)

    engine = StreamingEngine(settings)
    engine.warm_up_windows = 0
    outcomes: list[Outcome] = []
    worker = EngineWorker(lambda: engine, outcomes.append)
    bench = Bench()
    bench.worker = worker
    worker.start()
    bench.wait(lambda: worker.ready)
    for k in range(4):
        if k:
            for camera in (0, 6):
                assert worker.ingest(camera, k, picture(camera, k))
            bench.wait(lambda k=k: worker.status().counts.get("frames_ahead") == 2 * k)  # type: ignore[misc]
        assert worker.submit(window(k))
        bench.wait(lambda k=k: len(outcomes) == k + 1)  # type: ignore[misc]
    loaded = engine.loaded
    assert worker.close(60)

    plain = StreamingEngine(settings, loaded)
    for outcome in outcomes:
        expected = plain.step(window(outcome.observation.window_id))
        assert outcome.prediction is not None
        assert [s.reasoning for s in outcome.prediction.samples] == [s.reasoning for s in expected.samples]
        np.testing.assert_allclose(outcome.prediction.trajectory.xyz, expected.trajectory.xyz, atol=1e-3)
    assert [o.prediction.metrics["new_images"] for o in outcomes if o.prediction] == [8, 1, 1, 1]
