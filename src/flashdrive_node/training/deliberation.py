"""Whether the model thinks where the scene changes: deliberative tokens beside changes, against shuffled labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.model.errors import InputError


@dataclass(frozen=True)
class Deliberation:
    """Deliberative tokens of windows behind a change of the scene and of the others."""

    #: Share of the tokens; None where there is no such window.
    share_at_changes: float | None
    share_elsewhere: float | None
    windows_at_changes: int
    windows: int
    #: Share of shuffles with at least this difference between the two: one-sided.
    p_value: float | None


def deliberation(
    deliberative: NDArray[np.integer],
    tokens: NDArray[np.integer],
    changed: NDArray[np.bool_],
    clips: NDArray[np.integer],
    shuffles: int = 2000,
    seed: int = 0,
) -> Deliberation:
    """Compare, and shuffle the labels of each clip around in it: its windows stay in their order.

    Shifting a clip's labels as a whole keeps how long a change lasts, which drawing them one by one would not.

    Args:
        deliberative: Such tokens of each window, [N].
        tokens: All tokens of each window, [N].
        changed: Whether the scene has just changed, [N].
        clips: Number of each window's clip, [N]; windows of a clip stand in their order.
        shuffles: How many.
        seed: Of the shuffling.

    Raises:
        InputError: No windows, or arrays of different lengths.
    """
    if not len(tokens) or not len(tokens) == len(deliberative) == len(changed) == len(clips):
        lengths = [len(a) for a in (deliberative, tokens, changed, clips)]
        raise InputError(f"figures of as many windows are required, found {lengths}")
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(clips == clip) for clip in np.unique(clips)]

    def difference(labels: NDArray[np.bool_]) -> float:
        return _share(deliberative, tokens, labels) - _share(deliberative, tokens, ~labels)

    if not changed.any() or changed.all():
        share = _share(deliberative, tokens, np.ones(len(tokens), bool))
        everywhere = bool(changed.all())
        return Deliberation(
            share if everywhere else None, None if everywhere else share, int(changed.sum()), len(tokens), None
        )
    found, more = difference(changed), 0
    for _ in range(shuffles):
        shifted = np.empty_like(changed)
        for rows in members:
            shifted[rows] = np.roll(changed[rows], rng.integers(len(rows)))
        more += difference(shifted) >= found - 1e-12
    return Deliberation(
        _share(deliberative, tokens, changed),
        _share(deliberative, tokens, ~changed),
        int(changed.sum()),
        len(tokens),
        (more + 1) / (shuffles + 1),
    )


def _share(events: NDArray[np.integer], weights: NDArray[np.integer], chosen: NDArray[np.bool_]) -> float:
    return float(events[chosen].sum() / weights[chosen].sum())
