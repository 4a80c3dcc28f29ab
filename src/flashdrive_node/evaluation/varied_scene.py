"""The scene among many whose drive has the most to tell: several causes, none of them brief, seen by daylight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.model.errors import InputError
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import HISTORY, Episode, record
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.scenario import sample_scenes

#: Scenes that are driven at once.
_BATCH = 125
#: What counts as daylight with a clear view: share of night, and the distance over which contrast falls to 1/e.
_NIGHT_MAX, _VISIBILITY_MIN_M = 0.2, 500.0


def most_varied_scene(split: str, scenes: int, steps: int, on_progress: Callable[[int], object] | None = None) -> int:
    """Index of the scene in which the expert's causes share the time most evenly, by their entropy.

    Args:
        split: Where scenes come from.
        scenes: How many are tried, from index 0 on.
        steps: Length of the drive, of 0.1 s.
        on_progress: Called with the number of scenes that have been tried.

    Raises:
        InputError: The expert masters none of them by daylight.
    """
    best, chosen = -1.0, -1
    for first in range(0, scenes, _BATCH):
        indices = np.arange(first, min(first + _BATCH, scenes))
        episode = record(sample_scenes(scene_keys(split, indices)), steps)
        variety = torch.where(_clear(episode), _entropy(cause_steps(episode)), -1.0)
        row = int(variety.argmax())
        if float(variety[row]) > best:
            best, chosen = float(variety[row]), int(indices[row])
        if on_progress is not None:
            on_progress(int(indices[-1]) + 1)
    if chosen < 0:
        raise InputError(f"none of {scenes} scenes of split {split!r} is driven by daylight without a fault")
    return chosen


def cause_steps(episode: Episode) -> Tensor:
    """How many steps each cause is the reason, from the first full history on: int64 [S, causes]."""
    counts = torch.zeros(len(episode.scene), len(Cause), dtype=torch.int64)
    for step in range(HISTORY - 1, len(episode.decisions)):
        counts.scatter_add_(1, episode.reason(step).cause[:, None].cpu(), torch.ones_like(counts[:, :1]))
    return counts


def _clear(episode: Episode) -> Tensor:
    weather = episode.scene.weather
    return ~episode.faults.any & (weather.night < _NIGHT_MAX) & (weather.visibility > _VISIBILITY_MIN_M)


def _entropy(counts: Tensor) -> Tensor:
    return torch.distributions.Categorical(probs=counts.double()).entropy()
