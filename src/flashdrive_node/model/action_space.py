"""The unicycle action space: normalised (acceleration, curvature) per 0.1 s step to a path, and back.

Everything here is float32 and independent of the networks' precision. Frames: the vehicle frame at t0, x forward,
y left, z up; the last history pose is the origin. The estimates are regularised least squares with the release's
weights (``UnicycleAccelCurvatureActionSpace`` of the reference).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashdrive_node.model.config import ActionSpaceConfig


class Path(NamedTuple):
    """A driven or planned path; one row per waypoint at dt, 2 dt, ... after t0."""

    #: Positions [..., N, 3], metres.
    xyz: Tensor
    #: Rotations [..., N, 3, 3].
    rot: Tensor
    #: Yaw [..., N], radians, unwrapped.
    yaw: Tensor
    #: Speed [..., N], m/s.
    speed: Tensor
    #: Acceleration over the step that ends at the waypoint [..., N], m/s^2.
    acceleration: Tensor
    #: Curvature over the step that ends at the waypoint [..., N], 1/m.
    curvature: Tensor


class ActionSpace(nn.Module):
    """Normalisation constants and the maps in both directions."""

    constants: Tensor

    def __init__(self, config: ActionSpaceConfig):
        super().__init__()
        self.config = config
        values = (config.accel_mean, config.accel_std, config.curvature_mean, config.curvature_std)
        #: accel_mean, accel_std, curvature_mean, curvature_std.
        self.register_buffer("constants", torch.tensor(values, dtype=torch.float32))

    def initial_speed(self, history_xyz: Tensor, history_rot: Tensor) -> Tensor:
        """Speed at t0 from the ego history.

        Args:
            history_xyz: [..., T, 3], the last at t0.
            history_rot: [..., T, 3, 3].

        Returns:
            [...], m/s.
        """
        config = self.config
        steps = history_xyz[..., 1:, :2] - history_xyz[..., :-1, :2]
        yaw = unwrap(yaw_of(history_rot))
        return solve_speeds(steps, yaw, config.dt, config.v_lambda, config.v_ridge)[..., -1]

    def to_path(self, action: Tensor, initial_speed: Tensor, z: Tensor | float = 0.0) -> Path:
        """Integrate actions from the origin, heading along x.

        Args:
            action: Normalised (acceleration, curvature), [..., N, 2].
            initial_speed: [...], m/s.
            z: Height that every waypoint gets, [...] or a number.
        """
        dt, (accel_mean, accel_std, curv_mean, curv_std) = self.config.dt, self.constants.unbind()
        accel = action[..., 0] * accel_std + accel_mean
        curvature = action[..., 1] * curv_std + curv_mean
        v0 = initial_speed[..., None]
        speed = torch.cat((v0, v0 + torch.cumsum(accel * dt, dim=-1)), dim=-1)  # [..., N + 1]
        turned = torch.cumsum(curvature * speed[..., :-1] * dt, dim=-1)
        turned = turned + torch.cumsum(curvature * accel * (0.5 * dt**2), dim=-1)
        yaw = torch.cat((torch.zeros_like(v0), turned), dim=-1)
        vx, vy = speed * yaw.cos(), speed * yaw.sin()

        def trapezoid(v: Tensor) -> Tensor:
            return torch.cumsum(v[..., :-1] * (0.5 * dt), dim=-1) + torch.cumsum(v[..., 1:] * (0.5 * dt), dim=-1)

        x, y, yaw = trapezoid(vx), trapezoid(vy), yaw[..., 1:]
        height = torch.as_tensor(z, dtype=x.dtype, device=x.device)
        height = height[..., None] if height.ndim else height
        return Path(
            torch.stack((x, y, height.expand_as(x)), dim=-1), yaw_matrix(yaw), yaw, speed[..., 1:], accel, curvature
        )

    def to_action(self, history_xyz: Tensor, history_rot: Tensor, future_xyz: Tensor, future_rot: Tensor) -> Tensor:
        """Actions whose path follows a recorded future: the training target.

        Args:
            history_xyz, history_rot: As in `initial_speed`; the last position is the origin.
            future_xyz: [..., N, 3] at dt, 2 dt, ...
            future_rot: [..., N, 3, 3].

        Returns:
            Normalised actions [..., N, 2].
        """
        config, dt = self.config, self.config.dt
        if future_xyz.shape[-2] != config.n_waypoints:
            raise ValueError(f"a future of {config.n_waypoints} waypoints is required, found {future_xyz.shape[-2]}")
        v0 = self.initial_speed(history_xyz, history_rot)
        points = torch.cat((history_xyz[..., -1:, :], future_xyz), dim=-2)[..., :2]
        yaw = smooth_yaw(unwrap(yaw_of(future_rot)), dt, config.theta_lambda, config.theta_ridge)
        speed = solve_speeds(points[..., 1:, :] - points[..., :-1, :], yaw, dt, config.v_lambda, config.v_ridge, v0)
        one = torch.ones_like(speed[..., 1:])
        accel = solve_slopes(one, (speed[..., 1:] - speed[..., :-1]) / dt, dt, config.a_lambda, config.a_ridge)
        travelled = dt * speed[..., :-1] + (dt**2) / 2.0 * accel
        curvature = solve_slopes(travelled, yaw[..., 1:] - yaw[..., :-1], dt, config.kappa_lambda, config.kappa_ridge)
        accel_mean, accel_std, curv_mean, curv_std = self.constants.unbind()
        return torch.stack(((accel - accel_mean) / accel_std, (curvature - curv_mean) / curv_std), dim=-1)

    def within_bounds(self, path: Path) -> Tensor:
        """Whether every step respects the acceleration and curvature bounds: bool [...]."""
        (a0, a1), (k0, k1) = self.config.accel_bounds, self.config.curvature_bounds
        a, k = path.acceleration, path.curvature
        return ((a >= a0) & (a <= a1) & (k >= k0) & (k <= k1)).all(dim=-1)


def yaw_of(rot: Tensor) -> Tensor:
    """Heading of rotation matrices [..., 3, 3], radians [...]."""
    return torch.atan2(rot[..., 1, 0], rot[..., 0, 0])


def yaw_matrix(yaw: Tensor) -> Tensor:
    """Rotations about z: [...] radians -> [..., 3, 3]."""
    c, s, zero, one = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    return torch.stack((c, -s, zero, s, c, zero, zero, zero, one), dim=-1).unflatten(-1, (3, 3))


def unwrap(angle: Tensor) -> Tensor:
    """Make successive differences along the last dimension lie in (-pi, pi]."""
    step = torch.diff(angle, dim=-1)
    step = torch.atan2(step.sin(), step.cos())
    return torch.cat((angle[..., :1], angle[..., :1] + torch.cumsum(step, dim=-1)), dim=-1)


def roughness(n: int, order: int, weight: float, dt: float, like: Tensor) -> Tensor:
    """Quadratic form of ``weight * |d^order x / dt^order|^2`` over n samples: [n, n]."""
    d = torch.eye(n, dtype=like.dtype, device=like.device)
    for _ in range(order):
        d = d[1:] - d[:-1]
    return (weight / dt ** (2 * order)) * (d.T @ d)


def solve_speeds(
    steps: Tensor, yaw: Tensor, dt: float, weight: float, ridge: float, v0: Tensor | None = None
) -> Tensor:
    """Speeds at N + 1 times whose trapezoids along the headings make up N displacements.

    Minimises ``|v_i u_i + v_{i+1} u_{i+1} - 2 dp_i / dt|^2`` with a third-difference and a ridge term.

    Args:
        steps: Displacements [..., N, 2].
        yaw: Headings [..., N + 1].
        dt: Step, seconds.
        weight, ridge: Of the two regularisers.
        v0: First speed where it is known, [...]; otherwise it is solved for.

    Returns:
        [..., N + 1].
    """
    n = steps.shape[-2]
    cos, sin = yaw.cos(), yaw.sin()
    rows = torch.arange(n, device=steps.device)
    a = torch.zeros(*steps.shape[:-2], n, 2, n + 1, dtype=steps.dtype, device=steps.device)
    a[..., rows, 0, rows], a[..., rows, 0, rows + 1] = cos[..., :-1], cos[..., 1:]
    a[..., rows, 1, rows], a[..., rows, 1, rows + 1] = sin[..., :-1], sin[..., 1:]
    a = a.flatten(-3, -2)
    rhs = a.mT @ (2 / dt * steps).flatten(-2)[..., None]
    lhs = a.mT @ a + roughness(n + 1, 3, weight, dt, steps)
    identity = torch.eye(n + 1, dtype=steps.dtype, device=steps.device)
    if v0 is None:
        return solve(lhs + ridge * identity, rhs)[..., 0]
    # A known first unknown moves to the right-hand side.
    rest = rhs[..., 1:, :] - lhs[..., 1:, :1] * v0[..., None, None]
    solved = solve(lhs[..., 1:, 1:] + ridge * identity[1:, 1:], rest)[..., 0]
    return torch.cat((v0[..., None], solved), dim=-1)


def solve_slopes(slope: Tensor, y: Tensor, dt: float, weight: float, ridge: float) -> Tensor:
    """x with ``x_i slope_i = y_i``, small second differences and a ridge: all [..., N].

    A standing vehicle gives zero slopes; where that makes the system singular the ridge grows tenfold until it is not.
    """
    n = y.shape[-1]
    rough = roughness(n, 2, weight, dt, y)
    identity = torch.eye(n, dtype=y.dtype, device=y.device)
    rhs = (slope * y)[..., None]
    lhs = torch.diag_embed(slope * slope) + rough
    while True:
        factor, failed = torch.linalg.cholesky_ex(lhs + ridge * identity)
        if not bool(failed.any()):
            return torch.cholesky_solve(rhs.expand(*factor.shape[:-1], 1), factor)[..., 0]
        ridge = max(10 * ridge, 1e-6)


def smooth_yaw(yaw: Tensor, dt: float, weight: float, ridge: float) -> Tensor:
    """Headings [..., N] with small third differences, behind a fixed first heading of zero: [..., N + 1]."""
    n = yaw.shape[-1]
    identity = torch.eye(n, dtype=yaw.dtype, device=yaw.device)
    lhs = identity * (1 + ridge) + roughness(n + 1, 3, weight, dt, yaw)[1:, 1:]
    solved = solve(lhs.expand(*yaw.shape[:-1], n, n), yaw[..., None])[..., 0]
    return torch.cat((torch.zeros_like(yaw[..., :1]), solved), dim=-1)


def solve(lhs: Tensor, rhs: Tensor) -> Tensor:
    """Solve a symmetric positive definite system: [..., n, n], [..., n, 1] -> [..., n, 1]."""
    return torch.cholesky_solve(rhs, torch.linalg.cholesky(lhs))
