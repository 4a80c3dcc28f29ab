"""Roads as chains of straight lines and arcs, with exact projection onto them.

Frame: the world, x and y in metres, yaw in radians (left positive). Along a road a point has coordinates (s, d): metres
along the centreline and metres to its left. Shapes: S scenes, K pieces, P points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Curvatures below this are straight lines, 1/m.
STRAIGHT = 1e-6


class RoadPoint(NamedTuple):
    """Points in coordinates of the road."""

    #: [S, P], metres along.
    s: Tensor
    #: [S, P], metres to the left.
    d: Tensor
    #: Heading of the road there [S, P], radians.
    yaw: Tensor
    #: Curvature of the road there [S, P], 1/m.
    curvature: Tensor


@dataclass(frozen=True)
class Road:
    """The centreline of every scene: K pieces in a row, the last one as long as anybody drives."""

    #: Where the pieces begin along the road [S, K + 1], metres, and the end of the last one.
    knots: Tensor
    #: Pose at the beginning of every piece [S, K], metres and radians.
    x: Tensor
    y: Tensor
    yaw: Tensor
    #: [S, K], 1/m.
    curvature: Tensor

    def pose_at(self, s: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """World x, y and heading of the road at (s, d): [S, P] each."""
        piece = (torch.searchsorted(self.knots[:, 1:-1].contiguous(), s.contiguous(), right=True)).clamp(
            max=self.x.shape[1] - 1
        )
        x0, y0, yaw0, k = (t.gather(1, piece) for t in (self.x, self.y, self.yaw, self.curvature))
        along = s - self.knots[:, :-1].gather(1, piece)
        turn = k * along
        bent = k.abs() > STRAIGHT
        safe = torch.where(bent, k, torch.ones_like(k))
        forward = torch.where(bent, turn.sin() / safe, along)
        left = torch.where(bent, (1 - turn.cos()) / safe, torch.zeros_like(k))
        yaw = yaw0 + turn
        c, si = yaw0.cos(), yaw0.sin()
        x = x0 + c * forward - si * left - d * yaw.sin()
        y = y0 + si * forward + c * left + d * yaw.cos()
        return x, y, yaw

    def project(self, x: Tensor, y: Tensor, near_s: Tensor) -> RoadPoint:
        """Closest point of the road: [S, P] world positions -> [S, P].

        Args:
            x, y: World positions [S, P].
            near_s: Where on the road the point is thought to be [S, P]; a piece more than 60 m away is not considered,
                so that a road that comes back does not catch points of another part.
        """
        dx, dy = x[:, :, None] - self.x[:, None], y[:, :, None] - self.y[:, None]
        cos, sin, k = self.yaw.cos()[:, None], self.yaw.sin()[:, None], self.curvature[:, None]
        forward, left = cos * dx + sin * dy, cos * dy - sin * dx
        s, d = local_coordinates(forward, left, k)
        length = (self.knots[:, 1:] - self.knots[:, :-1])[:, None]
        inside = torch.minimum(torch.maximum(s, torch.zeros_like(s)), length.expand_as(s))
        start = self.knots[:, None, :-1]
        far = (start + inside - near_s[:, :, None]).abs() > 60.0
        # Distance to the piece: across it, plus what lies before its beginning or behind its end.
        cost = d.abs() + (s - inside).abs() + far * 1e6
        best = cost.argmin(dim=2, keepdim=True)
        s_best = (start + s).gather(2, best)[..., 0]
        first = self.yaw[:, None].expand_as(s).gather(2, best)[..., 0]
        bend = k.expand_as(s).gather(2, best)[..., 0]
        return RoadPoint(s_best, d.gather(2, best)[..., 0], first + bend * s.gather(2, best)[..., 0], bend)

    def curvature_at(self, s: Tensor) -> Tensor:
        """Curvature of the centreline [S, P] at s [S, P], 1/m."""
        piece = torch.searchsorted(self.knots[:, 1:-1].contiguous(), s.contiguous(), right=True)
        return self.curvature.gather(1, piece.clamp(max=self.x.shape[1] - 1))


def local_coordinates(forward: Tensor, left: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """(s, d) of points in the frame at the beginning of a line or arc; shapes broadcast.

    Written without the radius, so that it stays exact from arcs to straight lines.
    """
    bent = curvature.abs() > STRAIGHT
    curvature = torch.where(bent, curvature, 0)
    kx, ky = curvature * forward, 1 - curvature * left
    d = (2 * left - curvature * (forward * forward + left * left)) / (1 + torch.sqrt(kx * kx + ky * ky))
    safe = torch.where(bent, curvature, 1)
    return torch.where(bent, torch.atan2(kx, ky) / safe, forward), d


def chain(lengths: NDArray[np.float64], curvatures: NDArray[np.float64], start_m: float) -> Road:
    """Join pieces end to end, the first beginning at (start_m, 0) heading along x.

    Args:
        lengths: [S, K], metres.
        curvatures: [S, K], 1/m.
        start_m: s and x of the beginning, metres.
    """
    scenes, pieces = lengths.shape
    x, y, yaw = (np.zeros((scenes, pieces)) for _ in range(3))
    x[:, 0] = start_m
    for i in range(pieces - 1):
        k, turn = curvatures[:, i], curvatures[:, i] * lengths[:, i]
        bent = np.abs(k) > STRAIGHT
        safe = np.where(bent, k, 1.0)
        forward = np.where(bent, np.sin(turn) / safe, lengths[:, i])
        left = np.where(bent, (1 - np.cos(turn)) / safe, 0.0)
        c, s = np.cos(yaw[:, i]), np.sin(yaw[:, i])
        x[:, i + 1] = x[:, i] + c * forward - s * left
        y[:, i + 1] = y[:, i] + s * forward + c * left
        yaw[:, i + 1] = yaw[:, i] + turn
    knots = np.concatenate((np.full((scenes, 1), start_m), start_m + np.cumsum(lengths, axis=1)), axis=1)
    return Road(*(torch.from_numpy(a.copy()) for a in (knots, x, y, yaw, curvatures)))
