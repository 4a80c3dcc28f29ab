"""Unit quaternions (x, y, z, w) in numpy: matrix, product, interpolation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def matrix_from_quaternion(q: Array) -> Array:
    """Rotation matrices [..., 3, 3] of unit quaternions [..., 4]."""
    x, y, z, w = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def multiply(a: Array, b: Array) -> Array:
    """Hamilton product a * b of quaternions [..., 4]: b's rotation first."""
    ax, ay, az, aw = np.moveaxis(a, -1, 0)
    bx, by, bz, bw = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ],
        axis=-1,
    )


def quaternion_from_rotation_vector(v: Array) -> Array:
    """Unit quaternions [..., 4] of rotation vectors [..., 3] (axis times angle in radians)."""
    half = np.linalg.norm(v, axis=-1, keepdims=True) / 2
    # sin(h) / (2h) without the division by zero: numpy's sinc is sin(pi x) / (pi x).
    return np.concatenate([v * np.sinc(half / np.pi) / 2, np.cos(half)], axis=-1)


def slerp(a: Array, b: Array, fraction: Array) -> Array:
    """Shortest-arc interpolation between unit quaternions a and b [N, 4] at fractions [N] of 0 to 1."""
    dot = np.sum(a * b, axis=-1, keepdims=True)
    b = np.where(dot < 0, -b, b)
    angle = np.arccos(np.clip(np.abs(dot), 0.0, 1.0))
    t = fraction[..., None]
    sine = np.sin(angle)
    near = sine < 1e-6
    safe = np.where(near, 1.0, sine)
    q = np.where(near, (1 - t) * a + t * b, (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / safe)
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def quaternion_from_matrix(rotation: Array) -> Array:
    """The unit quaternion [4], x y z w with w >= 0, nearest to a rotation matrix [3, 3] (Bar-Itzhack, 2000)."""
    m = rotation
    k = np.array(
        [
            [m[0, 0] - m[1, 1] - m[2, 2], 0.0, 0.0, 0.0],
            [m[0, 1] + m[1, 0], m[1, 1] - m[0, 0] - m[2, 2], 0.0, 0.0],
            [m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], m[2, 2] - m[0, 0] - m[1, 1], 0.0],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], m[0, 0] + m[1, 1] + m[2, 2]],
        ]
    )
    # The eigenvector of the largest eigenvalue; eigh reads the lower triangle alone.
    q = np.linalg.eigh(k)[1][:, -1]
    return np.asarray(-q if q[3] < 0 else q, np.float64)
