"""Texts beside the truth of a drive: why the expert drove as it did, and whether a text says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from flashdrive_node.world.decision_text import StatedDecision

#: Longest time between a moment and the truth about it: half a step of the world.
_NEAR_NS = 50_000_000


@dataclass(frozen=True)
class Truth:
    """Sentences of the expert's drive, in order of time."""

    #: The scene, for whoever wants to build it again.
    split: str
    index: int
    stamps_ns: NDArray[np.int64]
    sentences: tuple[str, ...]

    def at(self, stamp_ns: int) -> str | None:
        """The sentence at a time, or None where there is none near it."""
        place = int(np.argmin(np.abs(self.stamps_ns - stamp_ns)))
        return self.sentences[place] if abs(int(self.stamps_ns[place]) - stamp_ns) <= _NEAR_NS else None


@dataclass(frozen=True)
class ReasoningScore:
    """How the texts of published windows compare with the truth."""

    #: Windows with a text and a truth.
    compared: int
    #: Shares of them: the same cause or manoeuvre; with the same pace too; texts that the wording cannot have made.
    same_cause: float
    same_decision: float
    malformed: float


def score_reasoning(records: list[dict[str, Any]], truth: Truth) -> ReasoningScore | None:
    """Compare the texts of published records with the truth at their t0; None where there is nothing to compare."""
    verdicts = [verdict for r in records if (verdict := compare(r["reasoning"], truth.at(r["t0_ns"]))) is not None]
    if not verdicts:
        return None
    cause, decision, malformed = (round(float(share), 4) for share in np.mean(verdicts, axis=0))
    return ReasoningScore(len(verdicts), cause, decision, malformed)


def compare(said: str, truth: str | None) -> tuple[bool, bool, bool] | None:
    """Whether a text names the true cause or manoeuvre, states the whole decision, and is malformed.

    None where there is no truth.
    """
    expected = stated(truth) if truth is not None else None
    if expected is None:
        return None
    found = stated(said)
    return found is not None and found.label == expected.label, found == expected, found is None


def stated(sentence: str) -> StatedDecision | None:
    """The decision that a sentence of the world states; see `decision_text.parse`."""
    from flashdrive_node.world.decision_text import parse  # brings torch, which other recordings do not need

    return parse(sentence)


def label_of(sentence: str) -> str:
    """A sentence's decision in a word or two, such as "cross traffic"."""
    decision = stated(sentence)
    return decision.label.lower().replace("_", " ") if decision is not None else "unclear"
