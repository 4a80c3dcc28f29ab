"""What an engine made of a clip, window by window, and its JSON file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashdrive_node.engine.protocol import Prediction, TrajectorySample
from flashdrive_node.evaluation.clip import Truth
from flashdrive_node.evaluation.intent import agrees, stated_intent
from flashdrive_node.evaluation.metrics import path_errors
from flashdrive_node.model.errors import InputError

#: Of the files; counts up when a key changes its meaning or goes.
VERSION = 1
_DIGITS = 5


@dataclass
class WindowScore:
    """One window. Lists have an entry per sample."""

    index: int
    t0_ns: int
    #: Of `metrics.path_errors`, metres; empty where there is no truth or no answer.
    errors: dict[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    #: Whether the text came to its end.
    complete: list[bool] = field(default_factory=list)
    #: Whether text and path agree; None where the text claims nothing.
    agree: list[bool | None] = field(default_factory=list)
    #: The driver's own sentence, where it is known.
    sentence: str | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    #: Why the engine gave no answer.
    problem: str = ""


@dataclass
class WorstWindow:
    """The window of a clip that is furthest off, with what is needed to draw it."""

    index: int
    ade_m: float
    #: Planned [samples][points][2] and driven [points][2], metres in the vehicle frame at t0.
    planned: list[list[list[float]]]
    driven: list[list[float]]
    texts: list[str]
    sentence: str | None = None


@dataclass
class ClipScores:
    """One clip."""

    name: str
    windows: list[WindowScore] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Why the clip ended early.
    problem: str = ""
    worst: WorstWindow | None = None
    #: Of some windows: change of the flow's velocity from step to step, relative to its size (`relative_change`).
    velocity_change: list[list[float]] = field(default_factory=list)
    version: int = VERSION

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> ClipScores:
        """Read a file.

        Raises:
            InputError: It is no result of this version.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"version {VERSION} is required, found {content['version']}")
            worst = content.pop("worst")
            windows = [WindowScore(**window) for window in content.pop("windows")]
            return cls(windows=windows, worst=worst and WorstWindow(**worst), **content)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a clip's result: {type(error).__name__}: {error}") from error


def score(index: int, prediction: Prediction, truth: Truth | None, dt_s: float = 0.1) -> WindowScore:
    """Compare an answer with what was driven.

    Args:
        index: Of the window in its clip.
        prediction: The engine's.
        truth: What was driven, or None where that is not known.
        dt_s: Spacing of the waypoints.
    """
    samples = prediction.samples
    scored = WindowScore(
        index,
        prediction.t0_ns,
        texts=[s.reasoning for s in samples],
        complete=[s.reasoning_complete for s in samples],
        agree=[_agrees(s, prediction.initial_speed) for s in samples],
        timings_ms=_rounded(prediction.timings_ms),
        metrics=_rounded(prediction.metrics),
    )
    if truth is None:
        return scored
    scored.sentence = truth.sentence
    paths = np.stack([s.xyz for s in samples])[None]
    if not np.isfinite(paths).all():
        scored.problem = "the path has values that are not finite"
        return scored
    errors = path_errors(paths, truth.xyz[None], truth.yaw[None], np.array([prediction.chosen]), dt_s)
    scored.errors = _rounded({name: float(values[0]) for name, values in errors.items()})
    return scored


def worst_window(index: int, ade_m: float, prediction: Prediction, truth: Truth) -> WorstWindow:
    """Keep a window for drawing."""
    return WorstWindow(
        index,
        ade_m,
        [np.round(s.xyz[:, :2].astype(float), 2).tolist() for s in prediction.samples],
        np.round(truth.xyz[:, :2].astype(float), 2).tolist(),
        [s.reasoning for s in prediction.samples],
        truth.sentence,
    )


def _agrees(sample: TrajectorySample, initial_speed: float) -> bool | None:
    intent = stated_intent(sample.reasoning)
    return None if intent is None else agrees(intent, initial_speed, sample.speed, sample.yaw)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    # JSON has no NaN.
    return {name: round(value, _DIGITS) for name, value in values.items() if np.isfinite(value)}
