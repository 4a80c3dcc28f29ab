"""What an engine's stages hand over until a prediction is made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flashdrive_node.engine.protocol import ReasoningToken, TrajectorySample
from flashdrive_node.model.inference import Generated
from flashdrive_node.model.tokenizer import AlpamayoTokenizer, extract_text


@dataclass(frozen=True)
class Reasoning:
    """The texts of one window, a row per sample."""

    text: Generated
    #: Figures for the prediction.
    metrics: dict[str, float] = field(default_factory=dict)
    #: Which tokens of each row a drafter guessed right; empty without a drafter.
    routine: tuple[tuple[bool, ...], ...] = ()


@dataclass(frozen=True)
class Departure:
    """What a window's paths start from."""

    #: Starting points of the flow, float32 [samples, waypoints, 2] on the model's device.
    noise: Tensor
    #: At t0, m/s, and height in metres.
    speed: float
    z: float


class Spoken(NamedTuple):
    """One sample's text, in words."""

    reasoning: str
    complete: bool
    tokens: tuple[ReasoningToken, ...]


def spoken(thought: Reasoning, tokenizer: AlpamayoTokenizer) -> tuple[Spoken, ...]:
    """Texts of a window, a row per sample; work of the host, which need not wait for the paths."""
    text = thought.text
    labels = thought.routine or ((),) * len(text.lengths)
    return tuple(
        Spoken(extract_text(tokenizer, ids)["cot"], stopped, _labelled(tokenizer, ids, routine))
        for ids, stopped, routine in zip(text.rows(), text.stopped, labels, strict=True)
    )


def trajectory_samples(numbers: Tensor, texts: Sequence[Spoken]) -> tuple[TrajectorySample, ...]:
    """Paths and texts of a window.

    Args:
        numbers: On the host, [samples, waypoints, 7]: position, yaw, speed, acceleration, curvature.
        texts: One per sample.
    """
    return tuple(_sample(row.numpy(), text) for row, text in zip(numbers, texts, strict=True))


def medoid(points: Tensor) -> Tensor:
    """The sample nearest to all others on average, which is the one to drive.

    Args:
        points: [..., samples, waypoints, 2]. A sample that is not finite is never nearest.

    Returns:
        Index of the sample, int64 [...].
    """
    finite = points.isfinite().flatten(-2).all(dim=-1)
    distance = (points.unsqueeze(-3) - points.unsqueeze(-4)).norm(dim=-1).mean(dim=-1)  # [..., samples, samples]
    total = distance.where(finite.unsqueeze(-2), 0.0).sum(dim=-1)
    return total.where(finite, math.inf).argmin(dim=-1)


def _sample(numbers: np.ndarray, text: Spoken) -> TrajectorySample:
    xyz, yaw, speed, acceleration, curvature = np.split(numbers, (3, 4, 5, 6), axis=-1)
    columns = (yaw[:, 0], speed[:, 0], acceleration[:, 0], curvature[:, 0])
    return TrajectorySample(xyz, *columns, *text)


def _labelled(
    tokenizer: AlpamayoTokenizer, ids: Sequence[int], routine: tuple[bool, ...]
) -> tuple[ReasoningToken, ...]:
    if not routine:
        return ()
    return tuple(ReasoningToken(tokenizer.decode([i]), guessed) for i, guessed in zip(ids, routine, strict=True))
