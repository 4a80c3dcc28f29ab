"""A drafter on recorded states, as `acceptance.replay` asks it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.prompt_slots import prompt_room
from flashdrive_node.engine.speculative import forbidden_bias
from flashdrive_node.model.language import LanguageModel
from flashdrive_node.training.acceptance import Acceptance, Guess, replay
from flashdrive_node.training.drafter_loss import last_states
from flashdrive_node.training.prompt_views import PromptViews, views_of
from flashdrive_node.training.text_records import TextRecorder, TextRecords


@dataclass(frozen=True)
class DraftingTarget:
    """What guessing needs of the target: networks, and how its texts end."""

    language: LanguageModel
    #: Added to logits, [vocabulary].
    forbidden: Tensor
    closing: int
    stop: int
    #: Of `prompt_room`.
    room: int

    @classmethod
    def of(cls, recorder: TextRecorder) -> DraftingTarget:
        """The target that a recorder lets write, whose weights are left alone from now on."""
        policy = recorder.policy
        bias, stop = forbidden_bias(policy.model, policy.rule), policy.rule.stop
        assert bias is not None
        assert stop is not None
        room = prompt_room(policy.tokenizer, policy.model.config)
        language = policy.model.language.requires_grad_(False)
        return cls(language, bias, policy.tokenizer.id("cot_end"), stop, room)

    def closed(self, known: Tensor, guesses: Tensor) -> Tensor:
        """As decoding does: behind the end of the reasoning comes the stop token. int64 [M] and [M, block - 1]."""
        before = torch.cat((known[:, None], guesses[:, :-1]), dim=1)
        return torch.where(before == self.closing, self.stop, guesses)


def guesser(drafter: Drafter, target: DraftingTarget, records: TextRecords, views: PromptViews | None) -> Guess:
    """The drafter's likeliest guesses on recorded states."""
    length = drafter.config.context_length

    @torch.no_grad()
    def guess(rows: Tensor, places: Tensor) -> Tensor:
        known, context = records.tokens[rows, places], last_states(records, rows, places, length)
        memory = None if views is None else drafter.read(views.view(rows))
        guesses = drafter.propose(target.language, known, context, target.forbidden, memory, places)
        return target.closed(known, guesses)

    return guess


def acceptance_of(drafter: Drafter, recorder: TextRecorder, records: TextRecords) -> Acceptance:
    """How a drafter does on records of a recorder."""
    target = DraftingTarget.of(recorder)
    views = views_of(records, recorder.prompt, drafter.config, target.room)
    return replay(records, guesser(drafter, target, records, views), drafter.config.block_size)
