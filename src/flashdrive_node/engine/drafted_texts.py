"""What the host keeps of texts that come in blocks: their tokens, who guessed them, and where they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashdrive_node.model.inference import Generated, StopRule


@dataclass(frozen=True)
class Speculated:
    """Texts and how fast they came."""

    text: Generated
    #: Slots that each text has taken, from the start of its stretch.
    slots: tuple[int, ...]
    #: Passes of the model over blocks of all rows.
    rounds: int
    #: Blocks of single rows that were looked at; a row that has ended is carried along unlooked.
    blocks: int
    #: Of each text, which tokens the drafter guessed right; the others are the model's own.
    routine: tuple[tuple[bool, ...], ...]

    @property
    def accept_length(self) -> float:
        """Tokens gained per block; 1 would be one-at-a-time decoding."""
        gained = sum(self.text.lengths) - len(self.text.lengths)  # the first of each row comes with the prefill
        return gained / self.blocks if self.blocks else 0.0


class DraftedTexts:
    """Texts of some rows while they are written."""

    def __init__(self, rows: int, max_length: int, rule: StopRule):
        """Nothing is written yet.

        Args:
            rows: Texts that are written side by side.
            max_length: Where a text is cut, tokens.
            rule: When it ends.
        """
        self._max_length, self._rule = max_length, rule
        self._texts: list[list[int]] = [[] for _ in range(rows)]
        # Per token whether it was guessed right; the first one comes with the prompt.
        self._routine: list[list[bool]] = [[False] for _ in range(rows)]
        #: Rows that go on.
        self.running = list(range(rows))
        self._rounds = self._blocks = 0

    def add(self, drawn: Sequence[Sequence[int]], size: int) -> None:
        """Take a round in.

        Args:
            drawn: Of every row: its token in front of the block, the model's own tokens behind each of the block, and
                behind these how many guesses were right.
            size: Tokens of a block.
        """
        if not self._rounds:
            self._texts = [[row[0]] for row in drawn]
            self._look()
        for row in self.running:
            accepted = drawn[row][size + 1]
            self._texts[row] += drawn[row][1 : accepted + 2]
            self._routine[row] += [True] * accepted + [False]
        self._rounds += 1
        self._blocks += len(self.running)
        self._look()

    def finished(self) -> tuple[Speculated, tuple[list[int], list[int]] | None]:
        """The texts, cut at their ends.

        Returns:
            Them, and where the last token of one has no slot in the cache yet: of each row a token that has its slot to
            get, and its place in the text (rows that miss none repeat their last).
        """
        # All but the model's own last token; a first one, of which the host learnt late, has been through a round.
        in_cache = [max(len(text) - 1, 1) for text in self._texts]
        texts = [text[: self._end(text)] for text in self._texts]
        stopped = [text[-1] == self._rule.stop for text in texts]
        slots = [
            len(text) if stop and len(text) < self._max_length else len(text) - 1
            for text, stop in zip(texts, stopped, strict=True)
        ]
        missing: tuple[list[int], list[int]] | None = None
        if any(have < need for have, need in zip(in_cache, slots, strict=True)):
            # The stop token came as the model's own behind a block: only it is missing.
            places = [max(n, 1) - 1 for n in slots]
            missing = [text[place] for text, place in zip(texts, places, strict=True)], places
        longest = max(len(t) for t in texts)
        padded = torch.tensor([t + [self._rule.pad] * (longest - len(t)) for t in texts])
        text = Generated(padded, tuple(len(t) for t in texts), tuple(stopped))
        labels = tuple(tuple(row[: len(t)]) for row, t in zip(self._routine, texts, strict=True))
        return Speculated(text, tuple(slots), self._rounds, self._blocks, labels), missing

    def _look(self) -> None:
        self.running = [row for row, text in enumerate(self._texts) if self._end(text) is None]

    def _end(self, tokens: list[int]) -> int | None:
        """Tokens up to where a text ends, or None while it goes on."""
        for i, token in enumerate(tokens[: self._max_length]):
            if token in (self._rule.stop, self._rule.end_of_turn):
                return i + 1
        return self._max_length if len(tokens) >= self._max_length else None
