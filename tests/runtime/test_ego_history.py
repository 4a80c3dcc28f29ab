"""The ego history against motions whose solution is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdrive_node.runtime.ego_history import EgoHistory, EgoRule, EgoWindow
from flashdrive_node.runtime.frames import Refusal
from flashdrive_node.runtime.observation import OdometrySample
from flashdrive_node.runtime.rotation import (
    matrix_from_quaternion,
    multiply,
    quaternion_from_rotation_vector,
    slerp,
)

START_NS = 1_700_000_000_000_000_000
TIMES = np.arange(-15, 1) / 10


def circle(t: float, speed: float, yaw_rate: float, pitch: float = 0.0) -> OdometrySample:
    """A vehicle that starts at the origin of the odom frame and turns left at ``yaw_rate`` on an inclined plane."""
    angle, radius = yaw_rate * t, speed / yaw_rate
    plane = np.array([0.0, math.sin(pitch / 2), 0.0, math.cos(pitch / 2)])
    position = matrix_from_quaternion(plane) @ [radius * math.sin(angle), radius * (1 - math.cos(angle)), 0.0]
    turn = np.array([0.0, 0.0, math.sin(angle / 2), math.cos(angle / 2)])
    x, y, z, w = multiply(plane, turn)
    return OdometrySample(
        START_NS + round(t * 1e9),
        "odom",
        "base_link",
        tuple(position),
        (x, y, z, w),
        (speed, 0.0, 0.0),
        (0.0, 0.0, yaw_rate),
    )


def straight(t: float, acceleration: float = 0.0, speed: float = 5.0) -> OdometrySample:
    x = speed * t + acceleration * t * t / 2
    velocity = (speed + acceleration * t, 0.0, 0.0)
    return OdometrySample(
        START_NS + round(t * 1e9), "odom", "base_link", (x, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0), velocity, (0.0, 0.0, 0.0)
    )


def filled(samples: list[OdometrySample], rule: EgoRule | None = None) -> EgoHistory:
    history = EgoHistory(rule, "base_link")
    for sample in samples:
        assert history.insert(sample) is None
    return history


def window_at(history: EgoHistory, t: float) -> EgoWindow:
    found = history.history_at(START_NS + round(t * 1e9))
    assert isinstance(found, EgoWindow), found
    return found


def refusal_at(history: EgoHistory, t: float) -> Refusal:
    found = history.history_at(START_NS + round(t * 1e9))
    assert isinstance(found, Refusal)
    return found


@settings(max_examples=40, deadline=None)
@given(
    rate=st.sampled_from([10.0, 50.0, 100.0, 400.0]),
    speed=st.floats(0.5, 30.0),
    yaw_rate=st.floats(-0.6, 0.6).filter(lambda w: abs(w) > 0.01),
    pitch=st.floats(-0.1, 0.1),
    t0=st.floats(2.0, 2.4),
)
def test_circle(rate: float, speed: float, yaw_rate: float, pitch: float, t0: float) -> None:
    history = filled([circle(k / rate, speed, yaw_rate, pitch) for k in range(int(2.5 * rate) + 1)])
    window = window_at(history, t0)
    radius, angles = speed / yaw_rate, yaw_rate * TIMES
    expected = np.stack([radius * np.sin(angles), radius * (1 - np.cos(angles)), np.zeros(16)], axis=1)
    # A chord leaves the arc by at most r (w dt)^2 / 8 = v w dt^2 / 8, at either end.
    sagitta = speed * abs(yaw_rate) / rate**2 / 8
    np.testing.assert_allclose(window.xyz, expected, atol=2.5 * sagitta + 2e-5)
    half = angles / 2
    quaternions = np.stack([0 * half, 0 * half, np.sin(half), np.cos(half)], axis=1)
    np.testing.assert_allclose(window.rot, matrix_from_quaternion(quaternions), atol=2e-6)
    assert window.xyz.dtype == window.rot.dtype == np.float32
    assert not window.xyz[-1].any()
    assert np.array_equal(window.rot[-1], np.eye(3))
    assert window.speed_twist == pytest.approx(speed)
    assert window.speed_implied == pytest.approx(speed, rel=0.01)
    truth = circle(t0, speed, yaw_rate, pitch)
    np.testing.assert_allclose(window.position, truth.position, atol=2 * sagitta + 1e-6)
    np.testing.assert_allclose(np.abs(window.orientation_xyzw @ np.array(truth.orientation_xyzw)), 1, atol=1e-9)


@pytest.mark.parametrize("rate", [10.0, 50.0, 100.0, 400.0])
@pytest.mark.parametrize("acceleration", [-3.0, 0.0, 4.0])
def test_constant_acceleration(rate: float, acceleration: float) -> None:
    history = filled([straight(k / rate, acceleration, 10.0) for k in range(int(2 * rate) + 1)])
    window = window_at(history, 1.97)
    v0 = 10.0 + acceleration * 1.97
    expected = v0 * TIMES + acceleration * TIMES**2 / 2
    np.testing.assert_allclose(window.xyz[:, 0], expected, atol=abs(acceleration) / rate**2 / 4 + 1e-5)
    assert window.speed_twist == pytest.approx(v0, abs=1e-6)
    assert window.extrapolated_s == 0


def test_sign_of_the_quaternion_does_not_matter() -> None:
    samples = [circle(k / 10, 10.0, 0.5) for k in range(31)]
    flipped = [
        replace(s, orientation_xyzw=tuple(-q for q in s.orientation_xyzw)) if k % 2 else s  # type: ignore[arg-type]
        for k, s in enumerate(samples)
    ]
    plain, other = window_at(filled(samples), 2.53), window_at(filled(flipped), 2.53)
    np.testing.assert_allclose(other.rot, plain.rot, atol=1e-6)
    np.testing.assert_allclose(other.xyz, plain.xyz, atol=1e-5)


def test_extrapolates_with_the_twist_only_as_far_as_allowed() -> None:
    samples = [circle(k / 50, 12.0, 0.4) for k in range(101)]
    assert refusal_at(filled(samples), 2.03).reason == "odometry_wait"
    history = filled(samples, EgoRule(max_extrapolation_s=0.05))
    window = window_at(history, 2.04)
    truth = circle(2.04, 12.0, 0.4)
    np.testing.assert_allclose(window.position, truth.position, atol=1e-3)
    np.testing.assert_allclose(window.orientation_xyzw, truth.orientation_xyzw, atol=1e-6)
    assert window.extrapolated_s == pytest.approx(0.04)
    assert history.newest_usable_ns() == START_NS + 2_050_000_000
    assert refusal_at(history, 2.06).text == "newest odometry is 60 ms older than t0"


def test_refuses_a_short_span_and_recovers() -> None:
    history = EgoHistory()
    assert refusal_at(history, 0).reason == "odometry_missing"
    assert history.newest_usable_ns() is None
    for k in range(75):
        history.insert(straight(k / 50))
    short = refusal_at(history, 1.48)
    assert short.text == "odometry must reach 1.5 s back from t0, it reaches 1.48 s"
    history.insert(straight(75 / 50))
    assert window_at(history, 1.5).xyz[0, 0] == pytest.approx(-7.5)


def test_gap() -> None:
    history = filled([straight(k / 50) for k in range(151) if not 60 < k < 75])
    gap = refusal_at(history, 2.0)
    assert gap.reason == "odometry_gap"
    assert "gap of 0.30 s (at most 0.25 s)" in gap.text
    assert isinstance(window_at(history, 3.0), EgoWindow)


@pytest.mark.parametrize(("distance", "reason"), [(50.0, "odometry_teleport"), (1.5, "odometry_twist")])
def test_teleport(distance: float, reason: str) -> None:
    samples = [straight(k / 50) for k in range(200)]
    samples[100:] = [replace(s, position=(s.position[0] + distance, 0.0, 0.0)) for s in samples[100:]]
    history = filled(samples)
    assert window_at(history, 1.9).speed_implied == pytest.approx(5.0)
    assert refusal_at(history, 2.5).reason == reason
    assert isinstance(window_at(history, 3.6), EgoWindow)


def test_twist_in_the_wrong_frame_is_noticed() -> None:
    """A vehicle that heads north with its velocity given in the odom frame."""
    samples = [
        replace(
            straight(k / 50, speed=10.0), position=(0.0, k / 5, 0.0), orientation_xyzw=(0.0, 0.0, 0.5**0.5, 0.5**0.5)
        )
        for k in range(101)
    ]
    assert isinstance(window_at(filled(samples), 2.0), EgoWindow)
    wrong = [replace(sample, linear_velocity=(0.0, 10.0, 0.0)) for sample in samples]
    refusal = refusal_at(filled(wrong), 2.0)
    assert refusal.reason == "odometry_twist"
    assert "poses imply (10.0, " in refusal.text
    assert "the twist says (0.0, 10.0, 0.0)" in refusal.text
    assert isinstance(window_at(filled(wrong, EgoRule(twist_tolerance_mps=math.inf)), 2.0), EgoWindow)


def test_faulty_samples_are_refused_and_counted() -> None:
    history = filled([straight(0.0), straight(0.02)])
    good = straight(0.04)
    faults = {
        "not_finite": replace(good, position=(math.nan, 0.0, 0.0)),
        "not_unit_quaternion": replace(good, orientation_xyzw=(0.0, 0.0, 0.0, 0.0)),
        "wrong_child_frame": replace(good, child_frame_id="camera"),
        "equal_stamp": straight(0.02),
        "backwards": straight(0.01),
    }
    for reason, sample in faults.items():
        refusal = history.insert(sample)
        assert refusal is not None
        assert refusal.reason == reason
    assert history.dropped == dict.fromkeys(faults, 1)
    assert history.received == 7
    assert history.insert(good) is None
    jump = history.insert(straight(-5.0))
    assert jump is not None
    assert (jump.reason, history.received) == ("clock_jump", 8)


def test_stamps_of_another_clock_are_dropped_without_a_jump() -> None:
    history = filled([straight(k / 50) for k in range(101)])
    now_ns = START_NS + 2_020_000_000
    stale, future = history.insert(straight(-3.0), now_ns), history.insert(straight(9.0), now_ns)
    assert stale is not None
    assert future is not None
    assert (stale.reason, future.reason) == ("stale", "future")
    assert "5.0 s behind the node's clock" in stale.text
    assert "7.0 s ahead of the node's clock" in future.text
    assert history.insert(straight(2.02), now_ns) is None
    assert isinstance(window_at(history, 2.02), EgoWindow)
    assert history.received == 104


def test_another_frame_starts_anew() -> None:
    history = filled([straight(k / 50) for k in range(101)])
    assert isinstance(window_at(history, 2.0), EgoWindow)
    change = history.insert(replace(straight(2.02), frame_id="map"))
    assert change is not None
    assert change.text == "odometry frame changed from 'odom' to 'map'"
    assert refusal_at(history, 2.02).reason == "odometry_span"


def test_store_is_bounded_and_keeps_the_newest() -> None:
    history = EgoHistory()
    for k in range(10_000):
        assert history.insert(straight(k / 400)) is None
    assert window_at(history, 9_999 / 400).speed_implied == pytest.approx(5.0)
    assert history._count <= 4096


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3))
def test_rotations(first: list[float], second: list[float]) -> None:
    a = quaternion_from_rotation_vector(np.array([first]))
    turn = quaternion_from_rotation_vector(np.array([second]))
    b = multiply(a, turn)
    np.testing.assert_allclose(
        matrix_from_quaternion(b), matrix_from_quaternion(a) @ matrix_from_quaternion(turn), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(matrix_from_quaternion(a)), 1, atol=1e-12)
    for fraction in (0.0, 0.3, 1.0):
        expected = multiply(a, quaternion_from_rotation_vector(np.array([second]) * fraction))
        for other in (b, -b):
            found = slerp(a, other, np.array([fraction]))
            np.testing.assert_allclose(matrix_from_quaternion(found), matrix_from_quaternion(expected), atol=1e-7)
