"""Following published trajectories: from a plan and the present state to acceleration and curvature, batched.

Along the path the vehicle is brought to the speed that the plan has a preview time T later; across it, to the heading
that the path has a preview distance L ahead, and back to the path. Both are critically damped: a heading gain of 1 / L
goes with a lateral gain of 1 / (2 L)^2, a speed gain of 1 / T with a position gain of 1 / (2 T)^2.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.scene import DT_S
from flashdrive_node.world.state import State

#: How far ahead the controller looks for the speed and for the heading, and the least that it looks for that, metres.
SPEED_PREVIEW_S, STEER_PREVIEW_S, STEER_PREVIEW_MIN_M = 0.5, 0.3, 0.5
#: How far it looks ahead for the speed while standing, and below which speed a vehicle or a plan stands, m/s.
START_PREVIEW_S, STANDING_M_S = 0.3, 0.1
#: Acceleration where there is nothing to follow, m/s^2.
GENTLE_BRAKE = -2.0
#: A trajectory that began longer ago is not driven any more, seconds.
MAX_AGE_S = 1.0
#: Position errors along the path that count, metres: a vehicle that fell behind does not race.
_ALONG_M = 1.0


@dataclass(frozen=True)
class Trajectory:
    """What S vehicles are to drive: P points each, the first where they were at t0. World frame, [S, P] each."""

    #: Seconds of the scene's clock, increasing; NaN where there is no trajectory.
    time_s: Tensor
    #: Rear axle, metres; heading, radians, unwrapped; m/s.
    x: Tensor
    y: Tensor
    yaw: Tensor
    speed: Tensor

    @property
    def exists(self) -> Tensor:
        """Whether there is a trajectory, and all of it is finite: bool [S]."""
        return torch.stack([getattr(self, f.name) for f in fields(self)]).isfinite().all(dim=2).all(dim=0)

    @property
    def along(self) -> Tensor:
        """Length of the path up to every point [S, P], metres."""
        steps = torch.hypot(torch.diff(self.x, dim=1), torch.diff(self.y, dim=1))
        return torch.cat((torch.zeros_like(self.x[:, :1]), steps.cumsum(dim=1)), dim=1)


class Command(NamedTuple):
    """What the controller wants of the vehicle."""

    #: Acceleration and curvature [S, 2], m/s^2 and 1/m: an action of `simulation.advance`.
    action: Tensor
    #: A trajectory is being followed; where not, the vehicle brakes to a standstill: bool [S].
    following: Tensor


def no_trajectory(state: State, points: int = 64) -> Trajectory:
    """Nothing to follow yet."""
    nothing = torch.full((len(state.x), points + 1), torch.nan, dtype=state.x.dtype, device=state.x.device)
    return Trajectory(nothing, nothing, nothing, nothing, nothing)


def from_vehicle(start: State, after_s: Tensor, xy: Tensor, yaw: Tensor, speed: Tensor) -> Trajectory:
    """A trajectory as it was published, in the vehicle frame of t0.

    Args:
        start: The vehicles at t0.
        after_s: Times after t0 [P] or [S, P], seconds, positive and increasing.
        xy: [S, P, 2], metres, x forward and y left.
        yaw: [S, P], radians.
        speed: [S, P], m/s.

    Raises:
        ValueError: The shapes do not belong together.
    """
    scenes, points = yaw.shape
    if xy.shape != (scenes, points, 2) or speed.shape != yaw.shape or len(start.x) != scenes:
        found = f"{tuple(xy.shape)}, {tuple(yaw.shape)}, {tuple(speed.shape)} for {len(start.x)} vehicles"
        raise ValueError(f"a trajectory needs xy [S, P, 2], yaw [S, P] and speed [S, P], found {found}")
    x0, y0, yaw0, speed0, time0 = (t[:, None] for t in (start.x, start.y, start.yaw, start.speed, start.time_s))
    cos, sin = yaw0.cos(), yaw0.sin()
    forward, left = xy.to(x0).unbind(2)

    def behind(first: Tensor, rest: Tensor) -> Tensor:
        return torch.cat((first, rest.to(first)), dim=1)

    return Trajectory(
        time_s=behind(time0, time0 + after_s.to(time0)),
        x=behind(x0, x0 + cos * forward - sin * left),
        y=behind(y0, y0 + sin * forward + cos * left),
        yaw=behind(yaw0, yaw0 + yaw.to(yaw0)),
        speed=behind(speed0, speed),
    )


def newest(held: Trajectory, published: Trajectory) -> Trajectory:
    """The published trajectory where there is one, else the one that is held."""
    new = published.exists[:, None]
    names = [f.name for f in fields(held)]
    return Trajectory(**{n: torch.where(new, getattr(published, n), getattr(held, n)) for n in names})


def track(trajectory: Trajectory, state: State, max_age_s: float = MAX_AGE_S) -> Command:
    """The next action of every vehicle.

    Without a trajectory, or with one that is too old, a vehicle brakes gently; along the old path where there is one.

    Args:
        trajectory: To be followed, S rows.
        state: Now, S rows.
        max_age_s: Longest time since t0 for which a trajectory is driven.
    """
    exists = trajectory.exists
    age = state.time_s - trajectory.time_s[:, 0]
    following = exists & (age < max_age_s)
    path = Trajectory(**{f.name: getattr(trajectory, f.name).nan_to_num(0.0, 0.0, 0.0) for f in fields(trajectory)})
    along = path.along
    at, offset = _project(path, along, state)
    accel = torch.where(following, _acceleration(path, along, at, state), GENTLE_BRAKE)
    curvature = torch.where(exists, _curvature(path, along, at, offset, state), 0.0)
    return Command(torch.stack((accel, curvature), dim=1), following)


def _acceleration(path: Trajectory, along: Tensor, at: Tensor, state: State) -> Tensor:
    # Who stands looks less far, and does not start long before the plan does.
    reach = torch.where(state.speed < STANDING_M_S, START_PREVIEW_S, SPEED_PREVIEW_S).to(state.speed)
    wanted = _interpolate(path.time_s, path.speed, state.time_s + reach)
    # A plan that stands by then is braked for up to its standstill: spread over all of the preview it would be overrun.
    stands = (path.speed < STANDING_M_S) & (path.time_s > state.time_s[:, None])
    left = torch.where(stands, path.time_s - state.time_s[:, None], SPEED_PREVIEW_S).amin(dim=1)
    stops = wanted < STANDING_M_S
    wanted = torch.where(stops, 0.0, wanted)
    preview = torch.where(stops, left.clamp(min=DT_S), reach)
    behind = _interpolate(path.time_s, along, state.time_s) - at
    closing = behind.clamp(-_ALONG_M, _ALONG_M) / (2 * SPEED_PREVIEW_S) ** 2
    return (wanted - state.speed) / preview + closing


def _curvature(path: Trajectory, along: Tensor, at: Tensor, offset: Tensor, state: State) -> Tensor:
    reach = (state.speed * STEER_PREVIEW_S).clamp(min=STEER_PREVIEW_MIN_M)
    # A path that ends earlier is bent as much in the rest of it as it would be in all.
    ahead = torch.minimum(reach, along[:, -1] - at).clamp(min=0.5 * STEER_PREVIEW_MIN_M)
    turn = _interpolate(along, path.yaw, at + ahead) - state.yaw
    return torch.atan2(turn.sin(), turn.cos()) / ahead - offset / (2 * reach) ** 2


def _project(path: Trajectory, along: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Closest point of each path: metres along it and the vehicle's offset to the left of it [S]."""
    x0, y0 = path.x[:, :-1], path.y[:, :-1]
    dx, dy = torch.diff(path.x, dim=1), torch.diff(path.y, dim=1)
    length = torch.diff(along, dim=1)
    px, py = state.x[:, None] - x0, state.y[:, None] - y0
    share = ((px * dx + py * dy) / (length * length).clamp(min=1e-9)).clamp(0, 1)
    ex, ey = px - share * dx, py - share * dy
    best = torch.hypot(ex, ey).argmin(dim=1, keepdim=True)
    at, heading = along[:, :-1] + share * length, path.yaw[:, :-1]
    at, ex, ey, heading = (t.gather(1, best)[:, 0] for t in (at, ex, ey, heading))
    return at, ey * heading.cos() - ex * heading.sin()


def _interpolate(grid: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Linear, row by row, constant beyond both ends: grids and values [S, P], places [S] -> [S]."""
    right = torch.searchsorted(grid, at[:, None].contiguous(), right=True).clamp(1, grid.shape[1] - 1)
    g0, g1, v0, v1 = (t.gather(1, i)[:, 0] for t in (grid, values) for i in (right - 1, right))
    share = ((at - g0) / (g1 - g0).clamp(min=1e-9)).clamp(0, 1)
    return v0 + share * (v1 - v0)
