"""The fake engine drives on as the ego history did, and fails as it is told."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdrive_node.engine.fake import FAULTS, FakeEngine, FakeSettings
from flashdrive_node.engine.protocol import EngineError, Observation
from flashdrive_node.runtime.checks import CheckRule, check_prediction


def observation(speed: float, yaw_rate: float, window_id: int = 3) -> Observation:
    """History of a circle that ends at the origin, heading along x."""
    times = np.arange(-15, 1) / 10
    yaw = yaw_rate * times
    chord = speed * times * np.sinc(yaw / 2 / np.pi)
    xyz = np.stack([chord * np.cos(yaw / 2), chord * np.sin(yaw / 2), 0 * yaw], axis=1)
    rot = np.tile(np.eye(3), (16, 1, 1))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0], rot[:, 0, 1] = np.sin(yaw), -np.sin(yaw)
    return Observation(window_id, 123, (), xyz.astype(np.float32), rot.astype(np.float32))


def loaded(settings: FakeSettings | None = None) -> FakeEngine:
    engine = FakeEngine(settings or FakeSettings(latency_s=0.0))
    info = engine.load()
    assert (info.checkpoint, info.waypoints, info.history_poses) == ("none", 64, 16)
    engine.warm_up()
    return engine


@settings(max_examples=60, deadline=None)
@given(speed=st.floats(2.0, 30.0), yaw_rate=st.floats(-0.3, 0.3), samples=st.integers(1, 6))
def test_continues_the_circle(speed: float, yaw_rate: float, samples: int) -> None:
    prediction = loaded(FakeSettings(latency_s=0.0, samples=samples)).step(observation(speed, yaw_rate))
    assert len(prediction.samples) == samples
    assert (prediction.window_id, prediction.t0_ns, prediction.chosen) == (3, 123, 0)
    assert prediction.initial_speed == pytest.approx(speed, rel=1e-3)
    times = np.arange(1, 65) / 10
    radius_angle = yaw_rate * times
    chord = speed * times * np.sinc(radius_angle / 2 / np.pi)
    expected = np.stack([chord * np.cos(radius_angle / 2), chord * np.sin(radius_angle / 2)], axis=1)
    np.testing.assert_allclose(prediction.trajectory.xyz[:, :2], expected, rtol=2e-3, atol=0.05)
    np.testing.assert_allclose(prediction.trajectory.yaw, radius_angle, atol=1e-2)
    ends = {tuple(sample.xyz[-1]) for sample in prediction.samples}
    assert len(ends) == samples
    assert check_prediction(prediction, 0.0, CheckRule()) == []
    assert "Window 3" in prediction.trajectory.reasoning


def test_standing_vehicle_stays() -> None:
    prediction = loaded().step(observation(0.0, 0.2))
    assert np.abs(prediction.trajectory.xyz).max() < 1e-3
    assert check_prediction(prediction, 0.0, CheckRule()) == []


def test_same_window_same_answer() -> None:
    engine = loaded(FakeSettings(latency_s=0.0, samples=3))
    first, second = engine.step(observation(5, 0.1)), engine.step(observation(5, 0.1))
    for a, b in zip(first.samples, second.samples, strict=True):
        np.testing.assert_array_equal(a.xyz, b.xyz)


def test_stream_counts_from_the_reset() -> None:
    engine = loaded()
    counts = [engine.step(observation(5, 0.1)).metrics["stream_windows"] for _ in range(3)]
    engine.reset("test")
    assert [*counts, engine.step(observation(5, 0.1)).metrics["stream_windows"]] == [1, 2, 3, 1]


def test_faults_that_raise() -> None:
    engine = loaded()
    engine.set_fault("raise")
    with pytest.raises(EngineError, match="'raise' is switched on"):
        engine.step(observation(5, 0.1))
    engine.set_fault("out_of_memory")
    with pytest.raises(MemoryError):
        engine.step(observation(5, 0.1))
    engine.set_fault("none")
    assert engine.step(observation(5, 0.1)).samples
    with pytest.raises(ValueError, match=f"one of {', '.join(FAULTS)}, found 'explode'"):
        engine.set_fault("explode")  # type: ignore[arg-type]


def test_faulty_predictions() -> None:
    engine = loaded()
    found = {}
    for fault in ("nan", "short", "jump"):
        engine.set_fault(fault)
        found[fault] = [v.kind for v in check_prediction(engine.step(observation(5, 0.1)), 0.0, CheckRule())]
    assert found == {"nan": ["not_finite"], "short": ["reasoning"], "jump": ["start"]}


@pytest.mark.parametrize("release", ["fault", "release"])
def test_hang_until_released(release: str) -> None:
    engine = loaded()
    engine.set_fault("hang")
    done = threading.Event()

    def step() -> None:
        engine.step(observation(5, 0.1))
        done.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not done.wait(0.05)
    if release == "fault":
        engine.set_fault("none")
    else:
        engine.release()
    thread.join(5)
    assert done.is_set()


def test_latency_and_slow_fault_are_waited_for() -> None:
    engine = loaded(FakeSettings(latency_s=0.02, slow_latency_s=0.1))
    assert engine.step(observation(5, 0.1)).timings_ms["total"] >= 20
    engine.set_fault("slow")
    assert engine.step(observation(5, 0.1)).timings_ms["total"] >= 100
    engine.set_fault("none")
    engine.set_latency(0.0)
    start = time.monotonic()
    engine.step(observation(5, 0.1))
    assert time.monotonic() > start


def test_load_reports_progress() -> None:
    reports: list[tuple[float, str]] = []
    FakeEngine(FakeSettings(load_s=0.01)).load(lambda fraction, text: reports.append((fraction, text)))
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_step_needs_a_loaded_engine() -> None:
    with pytest.raises(EngineError, match="step needs a loaded engine"):
        FakeEngine().step(observation(5, 0.1))
    engine = loaded()
    engine.close()
    with pytest.raises(EngineError, match="step needs a loaded engine"):
        engine.step(observation(5, 0.1))
    engine.load()
    assert engine.step(observation(5, 0.1)).samples


def probe(observation: Observation) -> dict[str, float]:
    return {"seen": float(observation.window_id)}


def test_probe_by_function_and_by_name() -> None:
    for given_probe in (probe, f"{__name__}:probe"):
        engine = loaded(FakeSettings(latency_s=0.0, probe=given_probe))
        assert engine.step(observation(5, 0.1, 42)).metrics["seen"] == 42
    for bad in ("nowhere", "nowhere:probe", "os:nothing", "os:sep"):
        with pytest.raises(ValueError, match="probe must"):
            FakeEngine(FakeSettings(probe=bad))
    with pytest.raises(ValueError, match="samples must be at least 1, found 0"):
        FakeEngine(FakeSettings(samples=0))
