"""Where a point of the vehicle frame appears in a picture: the camera models of sensor_msgs/CameraInfo.

The optical frame has x right, y down and z forward; pixel centres have whole coordinates, as in ROS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Distortion models of CameraInfo that `CameraModel` knows, and how many coefficients they have. Equidistant with
#: coefficients of zero is the f-theta model of the release's cameras: the angle is proportional to the radius.
DISTORTION_MODELS = {"plumb_bob": 5, "equidistant": 4}

#: Axes of the optical frame of a camera that looks along x, as columns in a frame with x forward, y left, z up.
_OPTICAL = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
#: Points nearer to the plane of the camera than this many radians of 90 degrees cannot be projected by a pinhole.
_MARGIN = math.radians(3.0)


@dataclass(frozen=True, eq=False)
class CameraModel:
    """Intrinsics as CameraInfo has them, and where the camera sits on the vehicle."""

    width: int
    height: int
    #: One of `DISTORTION_MODELS`, and its coefficients.
    distortion_model: str
    coefficients: tuple[float, ...]
    #: Focal lengths and principal point, pixels.
    focal: tuple[float, float]
    principal: tuple[float, float]
    #: The camera in the vehicle frame [3], metres, and the axes of its optical frame as columns [3, 3].
    position: Array
    rotation: Array

    def __post_init__(self) -> None:
        wanted = DISTORTION_MODELS.get(self.distortion_model)
        if wanted is None or len(self.coefficients) != wanted:
            known = ", ".join(f"{name} with {count}" for name, count in DISTORTION_MODELS.items())
            raise ValueError(
                f"distortion model and coefficients: one of {known} is required, found {self.distortion_model!r} with "
                f"{len(self.coefficients)}"
            )

    def matrix(self) -> list[float]:
        """The intrinsic matrix K of CameraInfo, row by row."""
        return [self.focal[0], 0.0, self.principal[0], 0.0, self.focal[1], self.principal[1], 0.0, 0.0, 1.0]

    def project(self, points: Array) -> Array:
        """Pixels (column, row) [N, 2] of points in the vehicle frame [N, 3]; NaN for what the camera cannot see.

        Points beside the picture are kept, so that a line to them can be drawn up to its edge.
        """
        right, down, forward = ((points - self.position) @ self.rotation).T
        across = np.hypot(right, down)
        angle = np.arctan2(across, forward)
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.distortion_model == "equidistant":
                x, y = self._equidistant(right, down, across, angle)
                seen = angle < 0.95 * np.pi
            else:
                x, y = self._plumb_bob(right / forward, down / forward)
                seen = angle < np.pi / 2 - _MARGIN
        pixels = np.stack((x * self.focal[0] + self.principal[0], y * self.focal[1] + self.principal[1]), axis=1)
        return np.where(seen[:, None], pixels, np.nan)

    def _equidistant(self, right: Array, down: Array, across: Array, angle: Array) -> tuple[Array, Array]:
        square = angle * angle
        series = sum(c * square ** (i + 1) for i, c in enumerate(self.coefficients))
        scale = np.where(across > 1e-12, angle * (1.0 + series) / np.maximum(across, 1e-12), 0.0)
        return right * scale, down * scale

    def _plumb_bob(self, x: Array, y: Array) -> tuple[Array, Array]:
        k1, k2, p1, p2, k3 = self.coefficients
        square = x * x + y * y
        radial = 1.0 + square * (k1 + square * (k2 + square * k3))
        return (
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
            y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
        )


def level_camera(
    size: tuple[int, int],
    field_of_view_deg: float,
    ftheta: bool,
    position: Sequence[float],
    yaw_deg: float,
) -> CameraModel:
    """An ideal camera that looks level.

    Args:
        size: Width and height, pixels.
        field_of_view_deg: Over the width, edge to edge.
        ftheta: The angle is proportional to the radius; otherwise a pinhole.
        position: In the vehicle frame, metres.
        yaw_deg: Heading, left positive.
    """
    width, height = size
    half = math.radians(field_of_view_deg) / 2
    focal = width / 2 / (half if ftheta else math.tan(half))
    model = "equidistant" if ftheta else "plumb_bob"
    c, s = math.cos(math.radians(yaw_deg)), math.sin(math.radians(yaw_deg))
    turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    return CameraModel(
        width=width,
        height=height,
        distortion_model=model,
        coefficients=(0.0,) * DISTORTION_MODELS[model],
        focal=(focal, focal),
        principal=((width - 1) / 2, (height - 1) / 2),
        position=np.array(position, np.float64),
        rotation=turn @ _OPTICAL,
    )
