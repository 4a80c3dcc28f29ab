"""How a drafter takes part in decoding: what it is asked, how far it looks, and how much of a block is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

#: Guesses from the known token of each text, int64 [rows], the context states [rows, context_length, context_size], and
#: the number of tokens in front of the known one in its text, int64 [rows]: int64 [rows, block - 1].
Propose = Callable[[Tensor, Tensor, Tensor], Tensor]

#: The same, and the probability that the drafter gives each guess, float32 [rows, block - 1].
ProposeSurely = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SkipRule:
    """How many of a block's guesses are checked at once: as many as the drafter is sure of."""

    propose: ProposeSurely
    #: Blocks that are checked, ascending; the last one is the drafter's.
    sizes: tuple[int, ...]
    #: Least probability that all guesses of a block are right, for it to be checked whole.
    confidence: float


def block_sizes(block: int) -> tuple[int, ...]:
    """The few sizes that a drafter's blocks are checked in, each a graph: a quarter, a half and the whole."""
    return tuple(sorted({max(block // 4, 2), max(block // 2, 2), block}))


@dataclass(frozen=True)
class DraftRule:
    """What a drafter is and how far it looks."""

    propose: Propose
    layer_ids: tuple[int, ...]
    #: Tokens per pass of the model: the known one and the guesses.
    block_size: int
    context_length: int
    #: After `closing` the text goes on with `stop` in a trained model: guessing so often saves the last pass.
    closing: int | None = None
    #: Called in front of every first block: takes in what the drafter looks at of the prompt.
    begin: Callable[[], None] | None = None
    #: Blocks of several sizes; by default all are the drafter's.
    skip: SkipRule | None = None


@dataclass(frozen=True)
class Script:
    """Texts to take in place of what the model says, for benchmarks: every pass is computed, then overruled."""

    #: int64 [rows, steps], on the model's device.
    tokens: Tensor
    #: Tokens that every block gains, 1 to the block size.
    gain: int
