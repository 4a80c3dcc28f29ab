"""What was said or true at each moment of a drive, as rows of labelled spans of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from flashdrive_node.evaluation.truth import Truth, label_of

Color = tuple[int, int, int]

#: RGB of labels in order of appearance; drives with more labels use them again.
_COLORS: tuple[Color, ...] = (
    (92, 150, 110),
    (82, 120, 190),
    (214, 120, 70),
    (170, 110, 190),
    (200, 180, 80),
    (90, 170, 180),
    (190, 90, 110),
    (140, 140, 150),
)


@dataclass(frozen=True)
class Strip:
    """A row that shows a label for every moment of the drive; `spans` are (from, to, label) in seconds."""

    name: str
    spans: Sequence[tuple[float, float, str]]


def reasoning_strips(
    records: Sequence[dict[str, Any]], truth: Truth, start_ns: int, end_ns: int
) -> tuple[Strip, Strip]:
    """The true decisions, and those that the published texts state, each from its publication to the next one's.

    Args:
        records: Published records in order of publication.
        truth: Of the recording.
        start_ns, end_ns: The part of the recording that is shown.
    """
    told = [(int(stamp), label_of(text)) for stamp, text in zip(truth.stamps_ns, truth.sentences, strict=True)]
    said = [(int(record["published_ns"]), label_of(record["reasoning"])) for record in records]
    return Strip("truth", _spans(told, start_ns, end_ns)), Strip("model", _spans(said, start_ns, end_ns))


def strip_colors(strips: Sequence[Strip]) -> dict[str, Color]:
    """A colour for every label, the same in all rows, in order of appearance."""
    labels = dict.fromkeys(label for strip in strips for _, _, label in strip.spans)
    return {label: _COLORS[i % len(_COLORS)] for i, label in enumerate(labels)}


def _spans(rows: Sequence[tuple[int, str]], start: int, end: int) -> list[tuple[float, float, str]]:
    """Each label from its time to the next one's, in seconds; equal neighbours are joined."""
    runs = [next(group) for _, group in groupby((r for r in rows if r[0] < end), key=lambda row: row[1])]
    ends = [*(stamp for stamp, _ in runs[1:]), end][: len(runs)]
    return [((a - start) / 1e9, (b - start) / 1e9, label) for (a, label), b in zip(runs, ends, strict=True)]
