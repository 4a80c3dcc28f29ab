"""How many guesses a drafter would have right: speculative decoding replayed on texts that the target has written.

At every position the target's own token is the recorded one, so the replay accepts exactly what decoding would accept
while it draws that text.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.evaluation.metrics import Estimate, bootstrap_mean, bootstrap_ratio
from flashdrive_node.training.text_records import TextRecords

#: Guesses for some texts: their rows and the place of the known token in each, int64 [R] -> int64 [R, block - 1].
Guess = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Acceptance:
    """Figures over N texts."""

    #: Tokens gained per pass of the target, the first token of a text excepted, which comes with the prompt.
    accept_length: Estimate
    #: Share of all tokens that were guessed right; the first of a text never is.
    routine_share: Estimate
    texts: int
    #: Mean tokens of a text, stop token included.
    text_length: float
    #: Share of blocks whose first k guesses are all right, of the blocks whose text is that long: k = 1, 2, ...
    by_place: list[float]
    #: Share of first guesses that are right: in blocks at the start of a text, and in the others.
    first_at_start: float
    first_later: float
    #: Blocks by number of accepted guesses.
    histogram: list[int]


@dataclass(frozen=True)
class Replayed:
    """What became of N texts, text by text."""

    #: Blocks, and tokens that were guessed right: int64 [N].
    blocks: Tensor
    routine: Tensor
    acceptance: Acceptance


class Round(NamedTuple):
    """The next block of each of R texts that are not at their ends."""

    #: Of the texts, and the place of each block's known token in its text, int64 [R].
    rows: Tensor
    places: Tensor
    #: Whether a text has a token at each guessed place, and whether all guesses so far are right, [R, block - 1].
    there: Tensor
    matching: Tensor


def rounds(records: TextRecords, guess: Guess, block_size: int) -> Iterator[Round]:
    """Decode all texts side by side, block by block."""
    tokens, lengths = records.tokens, records.lengths
    place = torch.zeros_like(lengths)
    while bool((running := place < lengths - 1).any()):
        rows = running.nonzero()[:, 0]
        at = place[rows]
        behind = at[:, None] + torch.arange(1, block_size, device=tokens.device)
        there = behind < lengths[rows][:, None]
        labels = tokens[rows[:, None], behind.clamp(max=tokens.shape[1] - 1)]
        matching = ((guess(rows, at) == labels) & there).cumprod(dim=1)
        yield Round(rows, at, there, matching)
        place[rows] = at + matching.sum(dim=1) + 1


def reached(records: TextRecords, guess: Guess, block_size: int) -> Tensor:
    """Row and place of the known token of every block that decoding asks for, int64 [blocks, 2]."""
    found = [torch.stack((r.rows, r.places), dim=1) for r in rounds(records, guess, block_size)]
    return torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.int64, device=records.tokens.device)


def replay(records: TextRecords, guess: Guess, block_size: int) -> Acceptance:
    """Go through all texts block by block; intervals are over clips."""
    return replay_texts(records, guess, block_size).acceptance


def replay_texts(records: TextRecords, guess: Guess, block_size: int) -> Replayed:
    """`replay`, with what became of each text."""
    lengths = records.lengths
    device = lengths.device
    blocks, routine = torch.zeros_like(lengths), torch.zeros_like(lengths)
    size = block_size - 1
    right, seen = torch.zeros(size, device=device), torch.zeros(size, device=device)
    starts, later = torch.zeros(2, device=device), torch.zeros(2, device=device)
    histogram = torch.zeros(block_size, dtype=torch.int64, device=device)
    for rows, at, there, matching in rounds(records, guess, block_size):
        accepted = matching.sum(dim=1)
        right += matching.sum(dim=0)
        seen += there.sum(dim=0)
        counts = torch.stack((matching[:, 0].float(), torch.ones_like(at, dtype=torch.float32)), dim=1)
        starts += counts[at == 0].sum(dim=0)
        later += counts[at > 0].sum(dim=0)
        histogram += torch.bincount(accepted, minlength=block_size)
        blocks[rows] += 1
        routine[rows] += accepted
    spoken = lengths > 1
    found = Acceptance(
        accept_length=_ratio((lengths - 1)[spoken], blocks[spoken], records.clips[spoken]),
        routine_share=_ratio(routine, lengths, records.clips),
        texts=len(records),
        text_length=float(lengths.double().mean()),
        by_place=(right / seen.clamp(min=1)).tolist(),
        first_at_start=float(starts[0] / starts[1].clamp(min=1)),
        first_later=float(later[0] / later[1].clamp(min=1)),
        histogram=histogram.tolist(),
    )
    return Replayed(blocks, routine, found)


def gained(before: Replayed, after: Replayed, records: TextRecords) -> Estimate:
    """By how much the accept length changed on the same texts, mean over clips, with its interval."""
    _, clip = records.clips.unique(return_inverse=True)
    spoken = records.lengths > 1
    tokens, *blocks = (
        torch.bincount(clip[spoken], weights=t[spoken].double(), minlength=int(clip.max()) + 1)
        for t in (records.lengths - 1, before.blocks, after.blocks)
    )
    there = tokens > 0
    lengths = [tokens[there] / b[there] for b in blocks]
    return bootstrap_mean((lengths[1] - lengths[0]).cpu().numpy())


def _ratio(values: Tensor, weights: Tensor, clips: Tensor) -> Estimate:
    """Sum of the ones over the sum of the others, with an interval over clips; int64 [N] each."""
    _, clip = clips.unique(return_inverse=True)
    events, whole = (torch.bincount(clip, weights=t.double()).cpu().numpy() for t in (values, weights))
    return bootstrap_ratio(events, whole)


class NGrams:
    """The baseline without a network: the commonest continuation of the last tokens, in the texts for training."""

    def __init__(self, texts: Sequence[Sequence[int]], order: int = 4):
        """Count; `order` is the number of tokens with the guessed one."""
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            for i, token in enumerate(text):
                for back in range(min(order - 1, i) + 1):
                    counts[tuple(text[i - back : i])][token] += 1
        self.order = order
        self._likeliest = {seen: counter.most_common(1)[0][0] for seen, counter in counts.items()}

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        """The next tokens, one after the other."""
        known = list(text)
        for _ in range(count):
            for back in range(min(self.order - 1, len(known)), -1, -1):
                found = self._likeliest.get(tuple(known[len(known) - back :]))
                if found is not None:
                    known.append(found)
                    break
        return known[len(text) :]

    def guesser(self, records: TextRecords, block_size: int) -> Guess:
        """For `replay`."""
        texts = records.tokens.cpu().numpy()

        def guess(rows: Tensor, places: Tensor) -> Tensor:
            found = [
                self.guess(texts[row, : place + 1].tolist(), block_size - 1)
                for row, place in zip(rows.tolist(), places.tolist(), strict=True)
            ]
            return torch.from_numpy(np.array(found, np.int64)).to(rows.device)

        return guess


def texts_of(records: TextRecords) -> list[list[int]]:
    """Tokens that count, text by text."""
    return [row[:n] for row, n in zip(records.tokens.tolist(), records.lengths.tolist(), strict=True)]
