"""Figures of one configuration over all its clips, with intervals over clips, and paired against another one's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from flashdrive_node.evaluation.clip_scores import ClipScores, WindowScore
from flashdrive_node.evaluation.metrics import (
    Comparison,
    Estimate,
    Percentiles,
    bootstrap_mean,
    bootstrap_ratio,
    compare,
)
from flashdrive_node.evaluation.schedule_search import QUANTILES
from flashdrive_node.model.errors import InputError
from flashdrive_node.world.decision_text import StatedDecision, parse

#: Windows at a clip's start that latencies leave out, as in the published figures: streams fill, shapes are new.
LATENCY_FROM = 3
#: Windows of one point of the curve by window index.
_BIN = 10
_WORST = 6


@dataclass
class Summary:
    """What a configuration achieves."""

    settings: dict[str, Any]
    clips: int
    windows: int
    #: Windows with an answer and a truth.
    scored: int
    #: Path errors by name and horizon, metres: mean over the windows of a clip, then over clips.
    errors: dict[str, Estimate] = field(default_factory=dict)
    #: Shares of texts, 0 to 1.
    texts: dict[str, Estimate] = field(default_factory=dict)
    #: By the world's label: share of texts that give the same one, and their number.
    labels: dict[str, tuple[float, int]] = field(default_factory=dict)
    #: Error by window index: first window of the bin, and its estimate.
    by_window: dict[str, list[tuple[int, Estimate]]] = field(default_factory=dict)
    latency_ms: dict[str, Percentiles] = field(default_factory=dict)
    #: Means over windows of the engine's own figures, such as "accept_length".
    metrics: dict[str, float] = field(default_factory=dict)
    #: Windows by accept length, in halves of a token.
    accept_lengths: dict[str, int] = field(default_factory=dict)
    #: Change of the flow's velocity into each step but the first: 10th percentile, median and 90th over windows.
    velocity_change: list[list[float]] = field(default_factory=list)
    #: Clip, window, ADE of the windows that are furthest off, one per clip.
    worst: list[tuple[str, int, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Name of the baseline, and the paired comparisons with it.
    baseline: str = ""
    compared: dict[str, Comparison] = field(default_factory=dict)

    def to_json(self) -> str:
        """Indented JSON; estimates are lists of mean, low, high, clips."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def summarise(settings: dict[str, Any], clips: Sequence[ClipScores]) -> Summary:
    """Put the clips of a run together.

    Args:
        settings: What it was made with.
        clips: Its results, partial ones included.

    Raises:
        InputError: Not one window was scored.
    """
    windows = [window for clip in clips for window in clip.windows]
    scored = [window for window in windows if window.errors]
    problems = [f"{clip.name}: {clip.problem}" for clip in clips if clip.problem]
    failed = [(clip, w) for clip in clips for w in clip.windows if w.problem]
    problems += [f"{clip.name}, window {w.index}: {w.problem}" for clip, w in failed]
    if not scored:
        raise InputError("nothing was scored:\n  " + "\n  ".join(problems or ["no clip has a window with truth"]))
    result = Summary(settings, sum(1 for clip in clips if clip.windows), len(windows), len(scored), problems=problems)
    result.notes = [f"{clip.name}: {note}" for clip in clips for note in clip.notes]
    for name in scored[0].errors:
        result.errors[name] = bootstrap_mean(_clip_means(clips, name))
    result.texts = _text_shares(clips)
    result.labels = _label_shares(scored)
    for name in ("ade@6.4s", "min_ade@6.4s"):
        result.by_window[name] = _by_window(clips, name)
    _add_measurements(result, windows)
    if changes := [change for clip in clips for change in clip.velocity_change]:
        result.velocity_change = np.quantile(np.array(changes), QUANTILES, axis=0).T.round(5).tolist()
    worst = sorted((c for c in clips if c.worst), key=lambda c: c.worst.ade_m if c.worst else 0.0, reverse=True)
    result.worst = [(c.name, c.worst.index, c.worst.ade_m) for c in worst[:_WORST] if c.worst]
    return result


def add_baseline(result: Summary, clips: Sequence[ClipScores], name: str, baseline: Sequence[ClipScores]) -> None:
    """Compare with another configuration, window by window on the windows that both have scored.

    Raises:
        InputError: They have none in common.
    """
    result.baseline = name
    other = {(clip.name, w.index): w for clip in baseline for w in clip.windows if w.errors}
    shared: dict[str, list[tuple[WindowScore, WindowScore]]] = {}
    for clip in clips:
        pairs = [(w, other[clip.name, w.index]) for w in clip.windows if w.errors and (clip.name, w.index) in other]
        if pairs:
            shared[clip.name] = pairs
    if not shared:
        raise InputError(f"windows that {name} has scored too are required, found none")
    names = set(next(iter(shared.values()))[0][1].errors)
    for error in (e for e in result.errors if e in names):
        ours = [float(np.mean([a.errors[error] for a, _ in pairs])) for pairs in shared.values()]
        theirs = [float(np.mean([b.errors[error] for _, b in pairs])) for pairs in shared.values()]
        if any(theirs):
            result.compared[error] = compare(ours, theirs)
    changed = [
        [a != b for one, two in pairs for a, b in zip(one.texts, two.texts, strict=False)] for pairs in shared.values()
    ]
    if changed := [values for values in changed if values]:
        counts = [sum(values) for values in changed], [len(values) for values in changed]
        result.texts["changed"] = bootstrap_ratio(*counts)


def _clip_means(clips: Iterable[ClipScores], error: str, indices: range | None = None) -> list[float]:
    """Mean of an error over the windows of each clip that have it (and whose index is one of these)."""
    means = []
    for clip in clips:
        windows = [w for w in clip.windows if error in w.errors and (indices is None or w.index in indices)]
        if windows:
            means.append(float(np.mean([w.errors[error] for w in windows])))
    return means


def _text_shares(clips: Sequence[ClipScores]) -> dict[str, Estimate]:
    """Empty, malformed, and of those that can be judged: agreeing with their path, of the driver's decision."""
    judged: dict[str, Callable[[WindowScore], list[bool]]] = {
        "empty": lambda w: [not text.strip() for text in w.texts],
        "malformed": lambda w: [is_malformed(t, c) for t, c in zip(w.texts, w.complete, strict=True)],
        "agree_with_path": lambda w: [agree for agree in w.agree if agree is not None],
        "readable": lambda w: [stated(text) is not None for text in w.texts] if w.sentence else [],
        "same_label": lambda w: [same for _, same, _ in decisions(w)],
        "same_decision": lambda w: [same for _, _, same in decisions(w)],
    }
    shares = {}
    for name, judge in judged.items():
        counts = [[value for window in clip.windows for value in judge(window)] for clip in clips]
        counts = [values for values in counts if values]
        if counts:
            shares[name] = bootstrap_ratio([sum(values) for values in counts], [len(values) for values in counts])
    return shares


def is_malformed(text: str, complete: bool) -> bool:
    """Whether a text is cut, or holds what no sentence does: special tokens, broken characters, line breaks."""
    return not complete or any(mark in text for mark in ("<|", "�", "\n"))


stated = lru_cache(maxsize=4096)(parse)


def decisions(window: WindowScore) -> list[tuple[str, bool, bool]]:
    """Per sample the label of the driver's decision, and whether the text states that label, and that decision."""
    driver: StatedDecision | None = stated(window.sentence) if window.sentence else None
    if driver is None:
        return []
    found = [stated(text) for text in window.texts]
    return [(driver.label, d is not None and d.label == driver.label, d == driver) for d in found]


def _label_shares(windows: Sequence[WindowScore]) -> dict[str, tuple[float, int]]:
    seen: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for window in windows:
        for label, same, _ in decisions(window):
            seen[label] += 1
            right[label] += same
    return {label: (right[label] / count, count) for label, count in seen.most_common()}


def _by_window(clips: Sequence[ClipScores], name: str) -> list[tuple[int, Estimate]]:
    longest = max((w.index for clip in clips for w in clip.windows), default=-1) + 1
    curve = []
    for first in range(0, longest, _BIN):
        means = _clip_means(clips, name, range(first, first + _BIN))
        if means:
            curve.append((first, bootstrap_mean(means)))
    return curve


def _add_measurements(result: Summary, windows: Sequence[WindowScore]) -> None:
    times: dict[str, list[float]] = {}
    figures: dict[str, list[float]] = {}
    for window in windows:
        for name, value in window.metrics.items():
            figures.setdefault(name, []).append(value)
        if window.index >= LATENCY_FROM:
            for stage, ms in window.timings_ms.items():
                times.setdefault(stage, []).append(ms)
    result.latency_ms = {stage: Percentiles.of(values) for stage, values in times.items()}
    result.metrics = {name: round(float(np.mean(values)), 4) for name, values in figures.items()}
    lengths = Counter(round(2 * value) / 2 for value in figures.get("accept_length", []))
    result.accept_lengths = {f"{length:g}": lengths[length] for length in sorted(lengths)}
