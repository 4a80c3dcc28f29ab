"""The unicycle action space: round trips on smooth drives, and against a step-by-step computation in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdrive_node.model.action_space import ActionSpace, solve_slopes, unwrap, yaw_matrix, yaw_of
from support.small_models import small_config

DT = 0.1


def space() -> ActionSpace:
    return ActionSpace(small_config().action_space)


def drive(v0: float, accel: np.ndarray, curvature: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, headings and speeds after every step; float64, one step at a time, 100 sub-steps each."""
    x = y = yaw = 0.0
    v = v0
    rows = []
    for a, k in zip(accel, curvature, strict=True):
        for _ in range(100):
            h = DT / 100
            mid_v = v + a * h / 2
            mid_yaw = yaw + k * mid_v * h / 2
            x, y = x + mid_v * math.cos(mid_yaw) * h, y + mid_v * math.sin(mid_yaw) * h
            yaw, v = yaw + k * mid_v * h, v + a * h
        rows.append((x, y, yaw, v))
    table = np.array(rows)
    return table[:, :2], table[:, 2], table[:, 3]


@st.composite
def smooth_drives(draw):
    """1.6 s of history and 6.4 s of future with slowly varying acceleration and curvature, never backwards."""
    v0 = draw(st.floats(2.0, 30.0))
    amplitude = draw(st.floats(-1.0, 1.0)) * min(1.5, v0 / 8)
    bend = draw(st.floats(-1.0, 1.0)) * min(0.1, 3.0 / v0**2)
    phase, period = draw(st.floats(0, 6.28)), draw(st.floats(5.0, 20.0))
    t = np.arange(79) * DT
    accel = amplitude * np.sin(2 * math.pi * t / period + phase)
    curvature = bend * np.cos(2 * math.pi * t / (1.3 * period) + phase)
    return v0, accel, curvature


def split(v0: float, accel: np.ndarray, curvature: np.ndarray) -> tuple[torch.Tensor, ...]:
    """History (16 poses, the last the origin) and future (64 poses) in the vehicle frame at t0."""
    xy, yaw, _ = drive(v0, accel, curvature)
    xy, yaw = np.vstack(([[0, 0]], xy)), np.concatenate(([0.0], yaw))
    origin, heading = xy[15], yaw[15]
    c, s = math.cos(heading), math.sin(heading)
    local = (xy - origin) @ np.array([[c, -s], [s, c]])
    xyz = torch.tensor(np.column_stack((local, np.zeros(len(local)))), dtype=torch.float32)
    rot = yaw_matrix(torch.tensor(yaw - heading, dtype=torch.float32))
    return xyz[:16], rot[:16], xyz[16:80], rot[16:80]


@settings(max_examples=60, deadline=None)
@given(smooth_drives())
def test_trajectory_to_action_and_back_within_2_cm(smooth):
    history_xyz, history_rot, future_xyz, future_rot = split(*smooth)
    actions = space()
    action = actions.to_action(history_xyz, history_rot, future_xyz, future_rot)
    assert action.shape == (64, 2)
    path = actions.to_path(action, actions.initial_speed(history_xyz, history_rot))
    assert float((path.xyz - future_xyz).norm(dim=-1).max()) < 0.02
    assert float((path.rot - future_rot).abs().max()) < 0.01
    assert bool(actions.within_bounds(path))


@settings(max_examples=40, deadline=None)
@given(smooth_drives())
def test_path_equals_fine_integration(smooth):
    """Against 100 sub-steps per step: the trapezoid's own error is 1 cm over 6.4 s on these drives."""
    v0, accel, curvature = smooth
    accel, curvature = accel[:64], curvature[:64]
    actions = space()
    a_mean, a_std, k_mean, k_std = actions.constants.double()
    raw = torch.tensor(np.column_stack((accel, curvature)))
    action = torch.stack(((raw[:, 0] - a_mean) / a_std, (raw[:, 1] - k_mean) / k_std), dim=-1).float()
    path = actions.to_path(action, torch.tensor(v0, dtype=torch.float32), z=1.5)
    xy, yaw, speed = drive(v0, accel, curvature)
    np.testing.assert_allclose(path.xyz[:, :2].numpy(), xy, atol=0.02)
    np.testing.assert_allclose(path.yaw.numpy(), yaw, atol=1e-4)
    np.testing.assert_allclose(path.speed.numpy(), speed, atol=1e-4)
    np.testing.assert_allclose(path.acceleration.numpy(), accel, atol=1e-6)
    np.testing.assert_allclose(path.curvature.numpy(), curvature, atol=1e-7)
    assert bool((path.xyz[:, 2] == 1.5).all())


@settings(max_examples=40, deadline=None)
@given(smooth_drives())
def test_initial_speed_of_smooth_drives(smooth):
    history_xyz, history_rot, *_ = split(*smooth)
    _, _, speed = drive(*smooth)
    assert abs(float(space().initial_speed(history_xyz, history_rot)) - speed[14]) < 0.05


def test_batches_equal_single_drives():
    actions = space()
    drives = [split(8.0 + i, np.full(79, 0.1 * i), np.full(79, 0.01 * i)) for i in range(3)]
    batch = actions.to_action(*(torch.stack(part) for part in zip(*drives, strict=True)))
    for i, one in enumerate(drives):
        torch.testing.assert_close(batch[i], actions.to_action(*one), rtol=1e-4, atol=1e-4)


def test_standing_vehicle_has_a_solution():
    """All slopes zero: the ridge keeps the system solvable and the path stays where it is."""
    actions = space()
    history, eye = torch.zeros(16, 3), torch.eye(3)
    action = actions.to_action(history, eye.expand(16, 3, 3), torch.zeros(64, 3), eye.expand(64, 3, 3))
    assert bool(action.isfinite().all())
    path = actions.to_path(action, actions.initial_speed(history, eye.expand(16, 3, 3)))
    assert float(path.xyz.norm(dim=-1).max()) < 1e-3


def test_singular_system_raises_the_ridge():
    zero = torch.zeros(8)
    solution = solve_slopes(zero, zero, 0.1, weight=0.0, ridge=0.0)
    assert bool(solution.isfinite().all())


def test_wrong_number_of_waypoints_is_refused():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="64 waypoints is required, found 63"):
        space().to_action(torch.zeros(16, 3), eye.expand(16, 3, 3), torch.zeros(63, 3), eye.expand(63, 3, 3))


def test_unwrap_and_yaw():
    yaw = torch.linspace(-9, 9, 100)
    wrapped = yaw_of(yaw_matrix(yaw))
    assert float(wrapped.abs().max()) <= math.pi + 1e-6
    torch.testing.assert_close(unwrap(wrapped) - wrapped[0], yaw - yaw[0], atol=1e-5, rtol=0)
