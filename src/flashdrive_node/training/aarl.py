"""Action-aware reinforcement learning of a drafter: rollouts with the frozen target, until held-out texts say stop."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.evaluation.metrics import Estimate, bootstrap_mean
from flashdrive_node.model.errors import InputError
from flashdrive_node.training.aarl_reward import AarlRule, DraftJudge, Judged
from flashdrive_node.training.action_value import ActionValue
from flashdrive_node.training.draft_replay import DraftingTarget, acceptance_of, guesser
from flashdrive_node.training.drafter_files import save_drafter, trainable
from flashdrive_node.training.drafter_loss import anchors
from flashdrive_node.training.drafter_training import DRAFTER
from flashdrive_node.training.optimiser import Optimiser
from flashdrive_node.training.prompt_views import views_of
from flashdrive_node.training.rollouts import Samples
from flashdrive_node.training.text_records import TextRecorder, TextRecords, join_records
from flashdrive_node.training.training_log import TrainingLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AarlSettings:
    """Of one run."""

    #: Time at most, and steps at most, which repeat themselves.
    minutes: float
    steps: int | None = None
    #: Steps per batch of windows; drafts are drawn anew in each.
    reuse: int = 4
    #: Steps between two looks at the held-out texts, and looks without a better one after which the run ends.
    every: int = 25
    patience: int = 6
    #: Mean distance to the reference, nats per guess, beyond which the run ends.
    kl_limit: float = 0.5
    #: Peak learning rate, and steps over which it rises.
    rate: float = 2e-4
    warm_up: int = 10
    seed: int = 0
    rule: AarlRule = field(default_factory=AarlRule)


@dataclass(frozen=True)
class HeldOut:
    """Texts to measure on, and windows among them whose actions are looked at."""

    records: TextRecords
    samples: tuple[Samples, ...]


def hold(samples: Iterator[Samples], texts: int, batches: int, name: str) -> HeldOut:
    """Take so many texts at most, and keep what actions need of so many batches.

    Raises:
        InputError: There is none.
    """
    records: list[TextRecords] = []
    kept: list[Samples] = []
    count = 0
    with tqdm(total=texts, desc=name, unit="text") as bar:
        for some in samples:
            if some.records is None:
                raise InputError("samples with records are required, found none")
            records.append(some.records)
            if len(kept) < batches:
                kept.append(some)
            count += len(some.records)
            bar.update(len(some.records))
            if count >= texts:
                break
    return HeldOut(join_records(records), tuple(kept))


class AarlTrainer:
    """Trains one drafter on its target's device."""

    def __init__(self, recorder: TextRecorder, drafter: Drafter, settings: AarlSettings):
        """Take a trained drafter over; what it is now becomes the reference.

        Args:
            recorder: Of the target, as the drafter was trained with.
            drafter: Every part of it is trained on.
            settings: Of the run.
        """
        self.recorder, self.settings = recorder, settings
        self.reference = copy.deepcopy(drafter).requires_grad_(False).eval()
        self.drafter = trainable(drafter)
        device = recorder.policy.model.device
        generator = torch.Generator(device).manual_seed(settings.seed)
        self.value = ActionValue(recorder.policy)
        self.judge = DraftJudge(self.drafter, self.reference, recorder, self.value, settings.rule, generator)
        self.log = TrainingLog({"settings": asdict(settings), "device": str(device)})

    def run(self, training: Iterator[Samples], validation: HeldOut, test: HeldOut) -> TrainingLog:
        """Learn, stop where the validation texts say so, and measure on both before and after.

        Raises:
            InputError: No window to learn from.
        """
        held = {"validation": validation, "test": test}
        before = {name: self.assess(self.reference, some) for name, some in held.items()}
        steps, seconds, reason = self._learn(training, validation)
        after = {name: self.assess(self.drafter, some) for name, some in held.items()}
        self.log.result = {
            "before": before, "after": after, "steps": steps, "seconds": round(seconds, 1), "ended": reason,
        }  # fmt: skip
        for name in held:
            logger.info("%s: %s", name, summary(before[name], after[name]))
        return self.log

    def save(self, directory: Path) -> None:
        """Write drafter, log and its plot."""
        self.log.result["bytes"] = save_drafter(self.drafter, directory / DRAFTER)
        self.log.write(directory)

    def assess(self, drafter: Drafter, held: HeldOut) -> dict[str, Any]:
        """Acceptance, and metres that the path with the drafter's own guesses is better than with the target's."""
        found = acceptance_of(drafter, self.recorder, held.records)
        gains = torch.cat([self._greedy_gains(drafter, samples) for samples in held.samples])
        clips = torch.cat([s.records.clips for s in held.samples if s.records is not None])
        return {"acceptance": asdict(found), "gain_m": by_clip(gains, clips)}

    def _greedy_gains(self, drafter: Drafter, samples: Samples) -> torch.Tensor:
        """Of the likeliest guesses behind the first token of each text, unverified, metres [B]."""
        records, target = samples.records, DraftingTarget.of(self.recorder)
        assert records is not None
        views = views_of(records, self.recorder.prompt, drafter.config, target.room)
        rows = torch.arange(len(records), device=records.tokens.device)
        drafts = guesser(drafter, target, records, views)(rows, rows * 0).tolist()
        texts = [row[:n] for row, n in zip(records.tokens.tolist(), records.lengths.tolist(), strict=True)]
        noise = torch.randn(
            samples.actions.shape,
            device=rows.device,
            generator=torch.Generator(rows.device).manual_seed(self.settings.seed),
        )
        own = self.value.errors(samples, rows, [text[: drafter.config.block_size] for text in texts], noise)
        guessed = [[text[0], *draft] for text, draft in zip(texts, drafts, strict=True)]
        return own - self.value.errors(samples, rows, guessed, noise)

    def _learn(self, training: Iterator[Samples], validation: HeldOut) -> tuple[int, float, str]:
        """Steps, seconds, and why it ended."""
        s = self.settings
        optimiser = Optimiser(self.drafter.named_parameters(), s.rate, 0.0, matrix_rate=None, warm_up=s.warm_up)
        best, best_state, looks_since = self._accepted(validation), self._state(), 0
        started, limit_s, clock, step, reason = time.monotonic(), 60 * s.minutes, 0.0, 0, "budget"
        rows: list[Judged] = []
        samples: Samples | None = None
        with tqdm(total=round(limit_s), desc="drafts", unit="s") as bar:
            while clock < 1:
                if samples is None or step % s.reuse == 0:
                    samples = _told_windows(training)
                judged = self.judge.judge(samples)
                judged.loss.backward()
                seconds = time.monotonic() - started
                step += 1
                clock = min(1.0, max(seconds / limit_s, 0.0 if s.steps is None else step / s.steps))
                optimiser.step(clock)
                rows.append(judged)
                if step % s.every and clock < 1:
                    continue
                with optimiser.averaged():  # single steps are noisy
                    accepted, state = self._accepted(validation), self._state()
                kl = self._write_row(rows, seconds, step, accepted)
                rows = []
                bar.update(round(seconds) - bar.n)
                if accepted > best:
                    best, best_state, looks_since = accepted, state, 0
                else:
                    looks_since += 1
                if kl > s.kl_limit or looks_since >= s.patience:
                    reason = "distance to the reference" if kl > s.kl_limit else "no better validation"
                    break
        self.drafter.load_state_dict(best_state)
        self.drafter.requires_grad_(False).eval()
        return step, time.monotonic() - started, reason

    def _accepted(self, held: HeldOut) -> float:
        return acceptance_of(self.drafter, self.recorder, held.records).accept_length.mean

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.drafter.state_dict().items()}

    def _write_row(self, rows: list[Judged], seconds: float, step: int, accepted: float) -> float:
        """Put means since the last look into the log, and return the distance to the reference."""
        names = {"accepted": "expected accepted guesses", "reward": "reward of the action", "kl": "KL, nats per guess"}
        names["gain_m"] = "path gained by drawn drafts, m"
        means = {title: sum(getattr(row, name) for row in rows) / len(rows) for name, title in names.items()}
        if not all(math.isfinite(value) for value in means.values()):
            raise InputError(f"finite losses are required, found {means} at step {step}: lower the rates")
        at = {"seconds": seconds, "step": float(step)}
        self.log.training.append(at | means)
        self.log.validation.append(at | {"accept length": accepted})
        return means[names["kl"]]


def _told_windows(training: Iterator[Samples]) -> Samples:
    """The next windows with a text in which something can be guessed.

    Raises:
        InputError: There are none.
    """
    for samples in training:
        if samples.records is not None and len(anchors(samples.records)):
            return samples
    raise InputError("windows to learn from are required, found none")


def by_clip(values: torch.Tensor, clips: torch.Tensor) -> Estimate:
    """Mean over clips of their means, with its interval: [N] each."""
    _, clip = clips.unique(return_inverse=True)
    count = torch.bincount(clip).double()
    return bootstrap_mean((torch.bincount(clip, weights=values.double()) / count).cpu().numpy())


def summary(before: dict[str, Any], after: dict[str, Any]) -> str:
    """One line."""
    lengths = [found["acceptance"]["accept_length"][0] for found in (before, after)]
    gains = [found["gain_m"][0] for found in (before, after)]
    return (
        f"accept length {lengths[0]:.2f} -> {lengths[1]:.2f}; path with unverified drafts {gains[0]:+.3f} m -> "
        f"{gains[1]:+.3f} m against the target's text"
    )
