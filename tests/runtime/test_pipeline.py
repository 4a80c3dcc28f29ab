"""The runtime without ROS, driven by simulated sensors: real decoding, real threads, the fake engine."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from flashdrive_node.runtime.checks import CheckRule, Violation, check_prediction
from flashdrive_node.runtime.delivery import Delivery
from flashdrive_node.runtime.frames import Frame
from flashdrive_node.runtime.observation import OdometrySample, RawImage
from support.pipeline_drive import CAMERAS, SPEED, START_NS, YAW_RATE, Drive, jpeg


@pytest.fixture
def drive() -> Iterator[Drive]:
    drive = Drive()
    yield drive
    drive.engine.release()
    assert drive.pipeline.close()
    drive.assert_accounts()


def violations(delivery: Delivery, age_s: float) -> list[Violation]:
    """What the node would find wrong with a delivery at that age."""
    assert delivery.prediction is not None
    return check_prediction(delivery.prediction, age_s, CheckRule(), delivery.ego.speed_twist)


def test_one_result_per_window(drive: Drive) -> None:
    drive.run(30)
    results = drive.results()
    # The history needs 1.5 s; from then on every tenth of a second has its window.
    assert [r.t0_ns for r in results] == [START_NS + k * 100_000_000 for k in range(15, 30)]
    assert [r.window_id for r in results] == list(range(1, 16))
    for result in results:
        expected = tuple(result.t0_ns - k * 100_000_000 for k in (3, 2, 1, 0))
        assert result.stamps_ns == dict.fromkeys(CAMERAS.values(), expected)
        assert result.received_ns <= result.chosen_ns <= result.submitted_ns <= result.started_ns <= result.finished_ns
        prediction = result.prediction
        assert prediction is not None
        assert prediction.initial_speed == pytest.approx(SPEED, abs=0.01)
        # The circle goes on: after 6.4 s the vehicle has turned by 1.28 rad.
        radius, angle = SPEED / YAW_RATE, YAW_RATE * 6.4
        np.testing.assert_allclose(
            prediction.trajectory.xyz[-1], [radius * math.sin(angle), radius * (1 - math.cos(angle)), 0], atol=0.1
        )
        assert violations(result, age_s=0.01) == []
        assert [v.kind for v in violations(result, age_s=5.0)] == ["age"]
    accounts = [camera.account for camera in drive.pipeline.status().cameras]
    assert all(account.used + account.held >= 18 and account.dropped.get("corrupt", 0) == 0 for account in accounts)


def test_each_frame_is_decoded_once(drive: Drive) -> None:
    drive.run(40)
    # Twenty-five windows need the frames of 28 ticks; those that leave before their turn need not be decoded.
    assert len(drive.results()) == 25
    assert 4 * 28 <= drive.pipeline._pool.decoded <= 4 * 40


def test_frames_leave_memory_without_the_garbage_collector(drive: Drive) -> None:
    gc.collect()
    gc.disable()
    try:
        drive.run(60)
        drive.deliveries.clear()
        alive = sum(isinstance(thing, Frame) for thing in gc.get_objects())
        held = sum(camera.account.held for camera in drive.pipeline.status().cameras)
        # What is held is stored; the last window is still known to the thread that decoded it.
        assert alive <= held + 32
    finally:
        gc.enable()


def test_silent_camera(drive: Drive) -> None:
    drive.run(20)
    before = len(drive.results())
    drive.make_image = lambda index, number: None if index == 2 else jpeg(index, number)
    drive.run(10)
    assert len(drive.results()) == before
    refusal = drive.pipeline.status().refusal
    assert refusal is not None
    assert (refusal.reason, refusal.camera) == ("silent", "cross_right")
    drive.make_image = jpeg
    drive.run(5)
    assert len(drive.results()) == before + 2
    assert drive.pipeline.status().refusal is None


def test_frozen_picture(drive: Drive) -> None:
    drive.run(20)
    before = len(drive.results())
    drive.make_image = lambda index, number: jpeg(index, 0 if index == 6 else number)
    drive.run(10)
    assert len(drive.results()) == before + 3
    status = drive.pipeline.status()
    assert status.refusal is not None
    assert (status.refusal.reason, status.refusal.camera) == ("frozen", "front_tele")
    assert [camera.name for camera in status.cameras if camera.frozen] == ["front_tele"]
    drive.make_image = jpeg
    drive.run(5)
    assert len(drive.results()) == before + 8


def test_corrupt_image(drive: Drive) -> None:
    drive.run(20)
    before = len(drive.results())
    drive.make_image = lambda index, number: jpeg(index, number)[: 200 if index == 1 else None]
    drive.run(6)
    assert len(drive.results()) == before
    status = drive.pipeline.status()
    assert status.cameras[1].account.dropped["corrupt"] >= 1
    assert "JPEG" in status.cameras[1].last_error
    drive.make_image = jpeg
    drive.run(5)
    assert len(drive.results()) == before + 2


def test_fast_cameras_use_the_frame_beside_a_corrupt_one() -> None:
    drive = Drive(rate_hz=30)
    drive.run(60)
    before = len(drive.results())
    newest = drive.results()[-1].t0_ns
    drive.make_image = lambda index, number: jpeg(index, number)[: 200 if index == 6 and number % 6 == 0 else None]
    drive.run(60)
    times = [newest, *(result.t0_ns for result in drive.results()[before:])]
    assert len(times) >= 18
    assert np.diff(times).max() <= 140_000_000
    assert drive.pipeline.status().cameras[3].account.dropped["corrupt"] >= 3
    assert drive.pipeline.close()
    drive.assert_accounts()


def test_size_change_resets_the_stream(drive: Drive) -> None:
    drive.run(20)
    before = len(drive.results())
    drive.make_image = lambda index, number: jpeg(index, number, (80, 48) if index == 0 else (64, 48))
    drive.run(3)
    assert len(drive.results()) == before
    refusal = drive.pipeline.status().refusal
    assert refusal is not None
    assert refusal.reason == "size_change"
    drive.run(2)
    results = drive.results()
    assert len(results) == before + 2
    assert results[before].prediction is not None
    assert results[before].prediction.metrics["stream_windows"] == 1
    assert drive.pipeline.status().resets["size_change"] == 1


def test_clock_jump_back_resets_and_recovers(drive: Drive) -> None:
    drive.run(20)
    before = len(drive.results())
    drive.offset_ns = -1_000_000_000_000
    drive.run(20)
    status = drive.pipeline.status()
    assert status.resets["clock_jump"] == 1
    assert len(drive.results()) == before + 5
    first = drive.results()[before]
    assert first.prediction is not None
    assert first.prediction.metrics["stream_windows"] == 1


def test_jump_forward_counts_as_a_gap(drive: Drive) -> None:
    drive.run(20)
    before = len(drive.results())
    drive.offset_ns = 60_000_000_000
    drive.run(20)
    assert drive.pipeline.status().resets["gap"] == 1
    # The odometry gap must leave the history before anything is said again.
    assert drive.results()[before].t0_ns == START_NS + drive.offset_ns + 35 * 100_000_000


@pytest.mark.parametrize("faulty", ["gap", "teleport", "nan"])
def test_odometry_faults(drive: Drive, faulty: str) -> None:
    drive.run(20)
    before = len(drive.results())

    def broken(sample: OdometrySample) -> OdometrySample | None:
        if faulty == "gap":
            return None
        x, y, z = sample.position
        position = (x + 100.0, y, z) if faulty == "teleport" else (math.nan, y, z)
        return replace(sample, position=position)

    drive.odometry = broken
    drive.run(5)
    assert len(drive.results()) == before
    drive.odometry = lambda sample: sample
    drive.run(21)
    # The last faulty sample leaves the span after 1.5 s.
    assert 3 <= len(drive.results()) - before <= 6
    assert drive.pipeline.status().refusal is None


def test_odometry_that_comes_late_does_not_cost_windows(drive: Drive) -> None:
    delayed: list[OdometrySample] = []

    def late(sample: OdometrySample) -> OdometrySample | None:
        delayed.append(sample)
        return delayed.pop(0) if len(delayed) > 12 else None

    drive.odometry = late
    drive.run(40)
    times = [result.t0_ns for result in drive.results()]
    assert len(times) >= 20
    assert np.all(np.diff(times) == 100_000_000)


def test_reset_discards_the_overtaken_result(drive: Drive) -> None:
    drive.run(20)
    before = len(drive.results())
    drive.engine.set_fault("hang")
    drive.run(1, settle=False)
    drive.wait(lambda: drive.pipeline.worker.status().state == "busy")
    drive.pipeline.reset("service")
    drive.engine.set_fault("none")
    drive.settle()
    assert drive.deliveries[-1].kind == "discarded"
    assert len(drive.results()) == before
    drive.run(20)
    assert len(drive.results()) == before + 5


def test_slow_engine_supersedes_and_accounts(drive: Drive) -> None:
    drive.run(16)
    drive.engine.set_fault("hang")
    drive.run(1, settle=False)
    drive.wait(lambda: drive.pipeline.worker.status().state == "busy")
    for _ in range(6):
        taken = drive.pipeline.status().windows_taken
        drive.run(1, settle=False)
        drive.wait(lambda taken=taken: drive.pipeline.status().windows_taken > taken)
    drive.engine.set_fault("none")
    drive.settle()
    kinds = [delivery.kind for delivery in drive.deliveries]
    assert kinds.count("superseded") == 5
    assert drive.results()[-1].t0_ns == drive.stamp_ns() - 100_000_000
    drive.run(10)
    dropped = drive.pipeline.status().cameras[0].account.dropped
    assert dropped["superseded"] == 2  # of seven frames the first and the last windows cover five


def test_inactive_pipeline_counts_and_forms_no_window(drive: Drive) -> None:
    drive.pipeline.set_active(False)
    drive.run(20)
    assert drive.deliveries == []
    assert drive.pipeline.status().cameras[0].account.dropped == {"inactive": 20}
    drive.pipeline.set_active(True)
    drive.run(5)
    assert len(drive.results()) == 2


def test_stamps_of_another_clock_are_dropped_and_said(drive: Drive) -> None:
    drive.run(16)
    image = RawImage(drive.stamp_ns(), time.monotonic_ns(), "jpeg", 0, 0, 0, False, jpeg(0, 0))
    drive.pipeline.on_image(0, image, drive.stamp_ns() + 10**11)
    drive.pipeline.on_image(0, image, drive.stamp_ns() - 10**11)
    camera = drive.pipeline.status().cameras[0]
    assert camera.account.dropped["stale"] == 1
    assert camera.account.dropped["future"] == 1
    assert "100.0 s ahead of the node's clock" in camera.last_error


def test_oversized_message_is_refused() -> None:
    drive = Drive()
    small = replace(drive.pipeline.rig, cameras=tuple(replace(c, max_bytes=100) for c in drive.pipeline.rig.cameras))
    drive.pipeline.rig = small
    drive.run(3)
    camera = drive.pipeline.status().cameras[0]
    assert camera.account.dropped == {"invalid": 3}
    assert "at most 100 bytes" in camera.last_error
    assert drive.pipeline.close()


def test_engine_failure_is_reported_and_recovers(drive: Drive) -> None:
    drive.run(20)
    drive.engine.set_fault("raise")
    drive.run(2)
    assert [d.kind for d in drive.deliveries[-2:]] == ["failed", "failed"]
    assert "switched on" in drive.deliveries[-1].text
    drive.engine.set_fault("none")
    before = len(drive.results())
    drive.run(3)
    assert len(drive.results()) == before + 3
    assert drive.pipeline.worker.status().counts["loads"] == 1


@pytest.mark.parametrize(("fault", "kind"), [("nan", "not_finite"), ("short", "reasoning"), ("jump", "start")])
def test_faulty_predictions_are_withheld(drive: Drive, fault: str, kind: str) -> None:
    drive.engine.set_fault(fault)  # type: ignore[arg-type]
    drive.run(17)
    delivery = drive.results()[-1]
    assert [v.kind for v in violations(delivery, age_s=0.0)] == [kind]
