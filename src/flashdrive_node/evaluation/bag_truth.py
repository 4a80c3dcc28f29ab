"""What a recording of the world knows beside its sensors: why the expert drove as it did, and which scene it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.runtime.bag import BagError, messages, open_bag

if TYPE_CHECKING:
    from flashdrive_node.world.decision_text import StatedDecision

#: std_msgs/String, JSON with what `world_bag.truth` gives, ``stamp_ns``, ``split`` and ``index``.
TRUTH_TOPIC = "/ground_truth/reasoning"
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


def read_truth(bag: Path) -> Truth | None:
    """The truth in a recording; None where it has none.

    Raises:
        BagError: The recording cannot be read, or its truth is not of this form.
    """
    with open_bag(bag) as reader:
        wanted = [c for c in reader.connections if c.topic == TRUTH_TOPIC]
        if not wanted:  # asked for no topic, the reader would give all of them
            return None
        texts: list[Any] = [reader.deserialize(raw, c.msgtype) for c, _, raw in messages(reader, wanted)]
    try:
        rows = sorted((json.loads(text.data) for text in texts), key=lambda row: row["stamp_ns"])
        stamps = np.array([row["stamp_ns"] for row in rows], np.int64)
        sentences = tuple(str(row["sentence"]) for row in rows)
        return Truth(str(rows[0]["split"]), int(rows[0]["index"]), stamps, sentences)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BagError(f"{bag}: {TRUTH_TOPIC} must hold JSON of a world's recording ({error!r})") from error


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
