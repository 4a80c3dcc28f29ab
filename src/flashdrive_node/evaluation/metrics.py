"""Errors of planned paths against the path that was driven, and intervals of their means.

Paths are rows of points at 0.1 s, 0.2 s, ... after t0 in the vehicle frame at t0 (x forward, y left, metres); heights
are not looked at. ADE and minADE are those of the Alpamayo reference: the mean distance over all points up to a
horizon, for minADE of the sample in which that mean is least. Means are taken over the windows of a clip first and then
over clips, and intervals are bootstrapped over clips, because windows of one clip resemble each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.model.errors import InputError

Floats = NDArray[np.float64]

#: Horizons of the published figures, seconds.
HORIZONS_S = (1.0, 3.0, 5.0, 6.4)


def displacements(paths: NDArray[np.floating], truth: NDArray[np.floating]) -> Floats:
    """Distance of every planned point from the driven one.

    Args:
        paths: Samples of each window, [windows, samples, points, 2 or 3], metres.
        truth: Driven paths, [windows, points, 2 or 3], metres.

    Returns:
        [windows, samples, points], metres.

    Raises:
        InputError: Shapes that do not fit each other, or numbers that are not finite.
    """
    paths, truth = _checked(paths, truth)
    return np.asarray(np.linalg.norm(paths - truth[:, None], axis=-1))


def track_errors(
    paths: NDArray[np.floating], truth: NDArray[np.floating], truth_yaw: NDArray[np.floating]
) -> tuple[Floats, Floats]:
    """The same difference, split along the driven heading at that time and across it.

    Args:
        paths, truth: As in `displacements`.
        truth_yaw: Driven headings in the vehicle frame at t0, [windows, points], radians.

    Returns:
        Along (ahead positive) and across (left positive), [windows, samples, points] each, metres.

    Raises:
        InputError: As in `displacements`.
    """
    paths, truth = _checked(paths, truth)
    yaw = np.asarray(truth_yaw, np.float64)
    if yaw.shape != truth.shape[:2] or not np.isfinite(yaw).all():
        raise InputError(f"finite headings {list(truth.shape[:2])} are required, found {list(yaw.shape)}")
    difference = paths - truth[:, None]
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    along = cos * difference[..., 0] + sin * difference[..., 1]
    across = cos * difference[..., 1] - sin * difference[..., 0]
    return along, across


def path_errors(
    paths: NDArray[np.floating],
    truth: NDArray[np.floating],
    truth_yaw: NDArray[np.floating],
    chosen: NDArray[np.integer] | None = None,
    dt_s: float = 0.1,
    horizons_s: Sequence[float] = HORIZONS_S,
) -> dict[str, Floats]:
    """All path errors of some windows.

    Args:
        paths, truth, truth_yaw: As in `track_errors`.
        chosen: The sample that is driven, [windows]; without it no ``driven_`` figure is given.
        dt_s: Spacing of the points.
        horizons_s: Each a number of points away.

    Returns:
        A figure per window under each name, [windows], metres. With ``@6.4s`` for the horizon: ``ade`` (mean over the
        samples: what one sample is expected to be off), ``min_ade`` (best sample), ``fde``, ``min_fde`` (the same at
        the last point alone), ``along``, ``across`` (mean size of the parts of ``ade``), ``driven_ade``, ``driven_fde``
        (of the chosen sample).

    Raises:
        InputError: Shapes that do not fit, numbers that are not finite, or horizons without a point.
    """
    distance = displacements(paths, truth)
    along, across = track_errors(paths, truth, truth_yaw)
    windows, samples, points = distance.shape
    if chosen is not None and (chosen.shape != (windows,) or ((chosen < 0) | (chosen >= samples)).any()):
        raise InputError(f"chosen samples [{windows}] below {samples} are required, found {chosen.tolist()}")
    found: dict[str, Floats] = {}
    for horizon_s in horizons_s:
        count = round(horizon_s / dt_s)
        if not 1 <= count <= points or abs(count * dt_s - horizon_s) > 1e-6:
            raise InputError(f"a horizon must be a multiple of {dt_s} s up to {points * dt_s:g} s, found {horizon_s} s")
        end = f"@{horizon_s:g}s"
        mean, last = distance[..., :count].mean(axis=2), distance[..., count - 1]
        found |= {"ade" + end: mean.mean(axis=1), "min_ade" + end: mean.min(axis=1)}
        found |= {"fde" + end: last.mean(axis=1), "min_fde" + end: last.min(axis=1)}
        found["along" + end] = np.abs(along[..., :count]).mean(axis=(1, 2))
        found["across" + end] = np.abs(across[..., :count]).mean(axis=(1, 2))
        if chosen is not None:
            rows = np.arange(windows)
            found |= {"driven_ade" + end: mean[rows, chosen], "driven_fde" + end: last[rows, chosen]}
    return found


class Estimate(NamedTuple):
    """A mean over clips and where it may lie."""

    mean: float
    low: float
    high: float
    clips: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


#: Resamples of a bootstrap, and what its interval covers.
RESAMPLES, LEVEL = 2000, 0.95


def bootstrap_mean(values: NDArray[np.floating] | Sequence[float], seed: int = 0) -> Estimate:
    """Mean over clips with its percentile bootstrap interval.

    Args:
        values: One per clip.
        seed: Of the resampling.

    Raises:
        InputError: No clip, or values that are not finite.
    """
    values = _clip_values(values)
    return _estimate(float(values.mean()), values[_resampled(len(values), seed)].mean(axis=1), len(values))


def bootstrap_ratio(
    values: NDArray[np.floating] | Sequence[float], weights: NDArray[np.floating] | Sequence[float], seed: int = 0
) -> Estimate:
    """A share of events, such as empty texts per window, whose number differs from clip to clip.

    Args:
        values: Events in each clip.
        weights: Of how many, in each clip; more than 0 in all.
        seed: Of the resampling.

    Raises:
        InputError: No clip, unequal lengths, values that are not finite, or weights that are not positive.
    """
    values, weights = _clip_values(values), _clip_values(weights)
    if len(values) != len(weights) or (weights <= 0).any():
        raise InputError(f"{len(values)} positive weights are required, found {weights.tolist()}")
    rows = _resampled(len(values), seed)
    ratios = values[rows].sum(axis=1) / weights[rows].sum(axis=1)
    return _estimate(float(values.sum() / weights.sum()), ratios, len(values))


class Comparison(NamedTuple):
    """One configuration against another on the same clips."""

    #: Of the differences, and of the difference of the means relative to the baseline's mean.
    difference: Estimate
    relative: Estimate


def compare(
    values: NDArray[np.floating] | Sequence[float], baseline: NDArray[np.floating] | Sequence[float], seed: int = 0
) -> Comparison:
    """The paired difference of two configurations, which is far narrower than that of their intervals.

    Args:
        values, baseline: One per clip, the same clips in the same order.
        seed: Of the resampling.

    Raises:
        InputError: Unequal or no clips, values that are not finite, or a baseline whose mean is zero.
    """
    values, baseline = _clip_values(values), _clip_values(baseline)
    if len(values) != len(baseline):
        raise InputError(f"the same clips are required for both, found {len(values)} and {len(baseline)}")
    if not baseline.mean():
        raise InputError("a baseline with a mean other than zero is required, found 0")
    rows = _resampled(len(values), seed)
    difference = values - baseline
    resampled, base = difference[rows].mean(axis=1), baseline[rows].mean(axis=1)
    # Resamples that are all zero have no ratio; there are none unless nearly every clip is zero.
    relative = np.divide(resampled, base, out=np.zeros_like(base), where=base != 0)
    clips = len(values)
    return Comparison(
        _estimate(float(difference.mean()), resampled, clips),
        _estimate(float(difference.mean() / baseline.mean()), relative, clips),
    )


@dataclass(frozen=True)
class Percentiles:
    """Distribution of one figure."""

    count: int
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Percentiles of at least one value."""
        p50, p95, p99 = (round(float(v), 3) for v in np.percentile(values, (50, 95, 99)))
        return cls(len(values), p50, p95, p99, round(float(max(values)), 3))


def _checked(paths: NDArray[np.floating], truth: NDArray[np.floating]) -> tuple[Floats, Floats]:
    planned: Floats = np.asarray(paths, np.float64)
    driven: Floats = np.asarray(truth, np.float64)
    if planned.ndim != 4 or driven.ndim != 3 or planned.shape[-1] < 2 or driven.shape[-1] < 2:
        raise InputError(
            "paths [windows, samples, points, 2 or 3] and truth [windows, points, 2 or 3] are required, "
            f"found {list(planned.shape)} and {list(driven.shape)}"
        )
    if (planned.shape[0], planned.shape[2]) != driven.shape[:2] or not planned.shape[1]:
        raise InputError(f"paths {list(planned.shape)} do not fit the truth {list(driven.shape)}")
    planned, driven = planned[..., :2], driven[..., :2]
    for name, values in (("paths", planned), ("truth", driven)):
        if not np.isfinite(values).all():
            bad = sorted({int(row[0]) for row in np.argwhere(~np.isfinite(values))})
            raise InputError(f"{name}: finite numbers are required, found others in windows {bad[:8]}")
    return planned, driven


def _clip_values(values: NDArray[np.floating] | Sequence[float]) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise InputError(f"one finite value per clip is required, found {array.tolist()}")
    return array


def _resampled(clips: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, clips, (RESAMPLES, clips))


def _estimate(mean: float, resampled: Floats, clips: int) -> Estimate:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Estimate(mean, float(low), float(high), clips)
