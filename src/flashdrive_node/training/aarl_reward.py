"""The objective of action-aware reinforcement learning of a drafter.

Drafts are what is sampled: at some places of the target's texts the drafter's guesses are drawn from its own
distribution. The target verifies, so no draft can change what the vehicle does; a draft is judged by what it would have
done, had it been committed without being verified, beside the target's own tokens at the same places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.training.acceptance import reached
from flashdrive_node.training.action_value import ActionValue
from flashdrive_node.training.draft_replay import DraftingTarget, guesser
from flashdrive_node.training.drafter_loss import Blocks, anchors, cut, guessed_logits
from flashdrive_node.training.prompt_views import PromptViews, views_of
from flashdrive_node.training.rollouts import Samples
from flashdrive_node.training.text_records import TextRecorder, TextRecords


@dataclass(frozen=True)
class AarlRule:
    """How drafts are judged."""

    #: Weight of the action's quality beside the accepted length. A policy gradient of four drafts per window is mostly
    #: noise: over 36 windows its norm is five times that of the accepted length's, so at a weight of 0.5 steps follow
    #: the noise. At this one it is a quarter.
    action_weight: float = 0.05
    #: Weight of the distance to the drafter that the run began with, in nats.
    kl_weight: float = 0.1
    #: Drafts that are drawn at a place where actions are looked at; at least 2, which are each other's baseline.
    drafts: int = 4
    #: Places per window, drawn from the whole text, that the accepted length is computed at beside those that decoding
    #: reaches.
    places: int = 4
    #: Metres of path error that count as one; more counts no more.
    scale_m: float = 0.5


@dataclass(frozen=True)
class Judged:
    """One batch."""

    #: A scalar with a gradient; to be minimised.
    loss: Tensor
    #: Expected accepted guesses of a block, reward of the drawn drafts' actions, distance to the reference in nats, and
    #: metres that a drawn draft's path is better than the target's.
    accepted: float
    reward: float
    kl: float
    gain_m: float


class DraftJudge:
    """Judges the drafts of one drafter."""

    def __init__(
        self,
        drafter: Drafter,
        reference: Drafter,
        recorder: TextRecorder,
        value: ActionValue,
        rule: AarlRule,
        generator: torch.Generator,
    ):
        """Args: what learns; the same as it was; the target; what measures actions; weights; of all that is drawn."""
        self.drafter, self.reference, self.recorder = drafter, reference, recorder
        self.value, self.rule, self.generator = value, rule, generator
        self.target = DraftingTarget.of(recorder)

    def judge(self, samples: Samples) -> Judged:
        """Loss of a batch of windows with their texts.

        Raises:
            ValueError: The samples have no records.
        """
        if samples.records is None:
            raise ValueError("samples with records are required, found none")
        rule, config, records = self.rule, self.drafter.config, samples.records
        views = views_of(records, self.recorder.prompt, config, self.target.room)
        chosen = self._places(records, views)
        blocks = cut(records, chosen, config.block_size, config.context_length, views)
        logs = self._log_probabilities(self.drafter, blocks)
        with torch.no_grad():
            reference = self._log_probabilities(self.reference, blocks)
        kl = distance(logs, reference, blocks.labels >= 0)
        accepted = expected_accepted(logs, blocks.labels, blocks.known, self.target)
        # One place of each window is looked at for its action.
        first = _first_of_each(chosen[:, 0])
        policy, reward, gain_m = self._action_part(samples, logs[first], chosen[first])
        loss = -accepted.mean() / (config.block_size - 1) + rule.action_weight * policy + rule.kl_weight * kl
        return Judged(loss, float(accepted.detach().mean()), reward, float(kl.detach()), gain_m)

    def _places(self, records: TextRecords, views: PromptViews | None) -> Tensor:
        """Row and place of blocks to learn from, int64 [M, 2], the first of each row one that decoding reaches.

        Decoding asks for few of the blocks of a text: its start, what follows a whole block, what follows an error. Of
        places drawn evenly most are never asked for. Some of those are kept, because other errors lead elsewhere.
        """
        guess = guesser(self.drafter, self.target, records, views)
        asked = self._shuffled(reached(records, guess, self.drafter.config.block_size))
        return torch.cat((asked, self._shuffled(anchors(records))[: self.rule.places * len(records)]))

    def _shuffled(self, places: Tensor) -> Tensor:
        return places[torch.randperm(len(places), generator=self.generator, device=places.device)]

    def _log_probabilities(self, drafter: Drafter, blocks: Blocks) -> Tensor:
        logits = guessed_logits(drafter, self.target.language, blocks, self.target.forbidden)
        return logits.float().log_softmax(dim=-1)

    def _action_part(self, samples: Samples, logs: Tensor, places: Tensor) -> tuple[Tensor, float, float]:
        """Policy gradient of drawn drafts: its loss, mean reward, and mean gain in metres.

        Args:
            samples: The windows.
            logs: Log-probabilities at one place of each of A windows, [A, block - 1, vocabulary].
            places: Row and place, int64 [A, 2].
        """
        n = self.rule.drafts
        drawn = torch.multinomial(logs.detach().exp().flatten(0, 1), n, replacement=True, generator=self.generator)
        drafts = drawn.view(*logs.shape[:2], n).permute(0, 2, 1)  # [A, drafts, block - 1]
        chances = logs[:, None].expand(-1, n, -1, -1).gather(3, drafts[..., None])[..., 0]
        counted = self._up_to_end(drafts)
        with torch.no_grad():
            gain_m = self._gains(samples, places, drafts)
            reward = (gain_m / self.rule.scale_m).clamp(-1, 1)
            # The other drafts of the same place are the baseline.
            advantage = (reward - reward.mean(dim=1, keepdim=True)) * n / (n - 1)
        loss = -(advantage * (chances * counted).sum(dim=2)).mean()
        return loss, float(reward.mean()), float(gain_m.mean())

    def _gains(self, samples: Samples, places: Tensor, drafts: Tensor) -> Tensor:
        """Metres that paths are nearer to the driven one with each draft than with the target's tokens."""
        records, device = samples.records, places.device
        assert records is not None
        windows, drafted, own = places[:, 0].tolist(), drafts.tolist(), []
        texts: list[list[int]] = []
        for (row, place), some in zip(places.tolist(), drafted, strict=True):
            text = records.tokens[row, : int(records.lengths[row])].tolist()
            own.append(text[: place + 1 + drafts.shape[2]])
            texts += [text[: place + 1] + draft for draft in some]
        shape = samples.actions.shape
        noise = torch.randn(shape, device=device, generator=self.generator)
        rows = torch.tensor(windows, device=device)
        with_own = self.value.errors(samples, rows, own, noise)
        with_drafts = self.value.errors(samples, rows.repeat_interleave(drafts.shape[1]), texts, noise)
        return with_own[:, None] - with_drafts.view(drafts.shape[:2])

    def _up_to_end(self, drafts: Tensor) -> Tensor:
        """1 for guesses up to the end of the reasoning, 0 behind, where they change nothing: [A, drafts, block - 1]."""
        ends = ((drafts == self.target.closing) | (drafts == self.target.stop)).long()
        return ((ends.cumsum(dim=2) - ends) == 0).float()


def expected_accepted(logs: Tensor, labels: Tensor, known: Tensor, target: DraftingTarget) -> Tensor:
    """Accepted guesses of a block on average over all drafts, with its exact gradient: no draft needs to be drawn.

    Guesses of a block are independent of each other given its context, so the chance that the first k are right is a
    product.

    Args:
        logs: Log-probabilities, [M, block - 1, vocabulary].
        labels: The target's tokens, int64 [M, block - 1]; -1 behind a text's end.
        known: The known token of each block, int64 [M].
        target: Behind the token that closes the reasoning its stop token is guessed, which is right.

    Returns:
        [M].
    """
    chance = logs.gather(2, labels.clamp(min=0)[..., None])[..., 0].exp()
    before = torch.cat((known[:, None], labels[:, :-1]), dim=1)
    chance = torch.where((before == target.closing) & (labels == target.stop), torch.ones_like(chance), chance)
    return (chance * (labels >= 0)).cumprod(dim=1).sum(dim=1)


def distance(logs: Tensor, reference: Tensor, counts: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the reference per guess that counts, nats: [M, block - 1, vocabulary] each."""
    # Forbidden tokens have probability zero in both.
    difference = torch.where(reference.isinf(), torch.zeros_like(logs), logs - reference)
    each = (logs.exp() * difference).sum(dim=-1)
    return (each * counts).sum() / counts.sum().clamp(min=1)


def _first_of_each(rows: Tensor) -> Tensor:
    """Index of the first entry with each value: int64 [M] -> [values]."""
    values, index = rows.unique(return_inverse=True)
    first = torch.full((len(values),), len(rows), device=rows.device)
    return first.scatter_reduce(0, index, torch.arange(len(rows), device=rows.device), "amin")
