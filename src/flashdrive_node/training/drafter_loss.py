"""The loss of a block drafter: every place of a text is the start of a block, the last one included.

DFlash's recipe: cross entropy of all guesses of a block, weighted by exp(-k / gamma), because a guess counts only where
those before it are right; and, where wanted, the distance to the target's own distribution at the same places, which
says more than the one token that was drawn of it. Embedding table and output head are the target's and stay unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding, kl_div

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.prompt_slots import PromptView
from flashdrive_node.model.language import LanguageModel
from flashdrive_node.training.prompt_views import PromptViews
from flashdrive_node.training.text_records import TextRecords


@dataclass(frozen=True)
class BlockLoss:
    """How guesses are weighed."""

    #: Decay of the weights over a block, in places.
    gamma: float = 3.0
    #: Share of the soft labels: 0 is cross entropy alone.
    soft: float = 0.5


@dataclass(frozen=True)
class Blocks:
    """Blocks cut out of texts."""

    #: The known token, int64 [M], and its context, [M, context_length, context_size].
    known: Tensor
    context: Tensor
    #: The tokens behind, int64 [M, block - 1]; -1 behind a text's end, where every guess is as good as another.
    labels: Tensor
    #: The target's states that these were drawn from, [M, block - 1, hidden].
    hidden: Tensor
    #: Tokens in front of the known one in its text, int64 [M].
    place: Tensor
    #: What a routine drafter is shown of the prompts that they are of, and which of these each block is of, int64 [M];
    #: without a view the row of the records.
    view: PromptView | None
    prompt: Tensor


def anchors(records: TextRecords) -> Tensor:
    """Row and place of every token that something follows, int64 [A, 2]."""
    places = torch.arange(records.tokens.shape[1], device=records.tokens.device)
    return (places[None] < records.lengths[:, None] - 1).nonzero()


def cut(
    records: TextRecords, chosen: Tensor, block_size: int, context_length: int, views: PromptViews | None = None
) -> Blocks:
    """Blocks at these anchors: int64 [M, 2]. A routine drafter's have their prompts with them."""
    row, place = chosen.unbind(1)
    device = chosen.device
    longest = records.tokens.shape[1]
    behind = place[:, None] + torch.arange(1, block_size, device=device)
    inside = behind < longest
    behind = behind.clamp(max=longest - 1)
    view, prompt = None, row
    if views is not None:
        rows, prompt = row.unique(return_inverse=True)
        view = views.view(rows)
    return Blocks(
        records.tokens[row, place],
        last_states(records, row, place, context_length),
        torch.where(inside, records.tokens[row[:, None], behind], -1),
        records.hidden[row[:, None], behind],
        place,
        view,
        prompt,
    )


def last_states(records: TextRecords, rows: Tensor, places: Tensor, context_length: int) -> Tensor:
    """Context of the tokens at these places: [M, context_length, context_size]."""
    window = torch.arange(records.lead - context_length, records.lead, device=places.device)
    return records.states[rows[:, None], places[:, None] + window]


def guessed_logits(drafter: Drafter, language: LanguageModel, blocks: Blocks, forbidden: Tensor) -> Tensor:
    """What a drafter thinks of blocks: float32 [M, block - 1, vocabulary], `forbidden` added."""
    memory = None if blocks.view is None else drafter.read(blocks.view).rows(blocks.prompt)
    guesses = drafter(embedding(blocks.known, language.embed_tokens.weight), blocks.context, memory, blocks.place)
    return language.logits(guesses) + forbidden


def block_loss(
    drafter: Drafter, language: LanguageModel, blocks: Blocks, forbidden: Tensor, settings: BlockLoss
) -> tuple[Tensor, Tensor]:
    """Loss, and share of guesses that are right at each place of the block.

    Args:
        drafter: What is trained.
        language: The target, for its embedding table and output head.
        blocks: M blocks.
        forbidden: Added to logits, [vocabulary]; see `speculative.forbidden_bias`.
        settings: How guesses are weighed.

    Returns:
        A scalar with a gradient, and float32 [block - 1] without.
    """
    logits = guessed_logits(drafter, language, blocks, forbidden)
    counts = blocks.labels >= 0
    places = torch.arange(blocks.labels.shape[1], device=logits.device)
    weight = torch.exp(-places / settings.gamma) * counts
    labels = blocks.labels.clamp(min=0)
    loss = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    if settings.soft:
        with torch.no_grad():
            target = (language.logits(blocks.hidden) + forbidden).log_softmax(dim=-1)
        # Forbidden tokens have probability zero in both; minus infinity less itself would be no number.
        allowed = forbidden == 0
        apart = kl_div(
            logits.log_softmax(dim=-1)[..., allowed], target[..., allowed], log_target=True, reduction="none"
        )
        loss = (1 - settings.soft) * loss + settings.soft * apart.sum(dim=-1)
    right = (logits.detach().argmax(dim=-1) == labels) & counts
    return (loss * weight).sum() / weight.sum(), right.sum(dim=0) / counts.sum(dim=0).clamp(min=1)
