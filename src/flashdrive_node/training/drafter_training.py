"""Training of a block drafter: the target writes texts for a while, then the drafter learns from them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.speculative import forbidden_bias
from flashdrive_node.training.acceptance import Acceptance, Guess, NGrams, replay, texts_of
from flashdrive_node.training.drafter_files import save_drafter, trainable
from flashdrive_node.training.drafter_loss import BlockLoss, anchors, block_loss, cut
from flashdrive_node.training.optimiser import Optimiser
from flashdrive_node.training.text_records import (
    Scenes,
    TextRecorder,
    TextRecords,
    join_records,
    take,
)
from flashdrive_node.training.training_log import TrainingLog, mean_rows

logger = logging.getLogger(__name__)

#: Names of a run's parts in its directory.
DRAFTER = "drafter"
_LOG_STEPS = 50


@dataclass(frozen=True)
class DrafterSettings:
    """Of one run."""

    #: Time of learning at most, behind the writing of texts, and steps at most, which repeat themselves.
    minutes: float
    steps: int | None = None
    #: Texts to learn from, and texts of other clips to measure on.
    texts: int = 20000
    held_out: int = 1000
    #: Time of writing texts to learn from at most; those to measure on get a quarter of it.
    writing_minutes: float = math.inf
    #: Blocks per step.
    batch: int = 2048
    #: Peak learning rates: of vectors, and of matrices (see `Optimiser`).
    rate: float = 2e-3
    matrix_rate: float = 1e-2
    decay: float = 0.01
    seed: int = 0
    loss: BlockLoss = field(default_factory=BlockLoss)


class DrafterTrainer:
    """Trains one drafter on its target's device."""

    def __init__(self, recorder: TextRecorder, drafter: Drafter, settings: DrafterSettings):
        """Take a drafter over.

        Args:
            recorder: Of the target, with the drafter's layers and context.
            drafter: New or trained before, on the target's device; every part of it is trained on.
            settings: Of the run.
        """
        self.recorder, self.settings = recorder, settings
        self.drafter = trainable(drafter)
        policy = recorder.policy
        self.language = policy.model.language.requires_grad_(False)
        bias = forbidden_bias(policy.model, policy.rule)
        assert bias is not None
        self.forbidden = bias
        self.log = TrainingLog({"settings": asdict(settings), "device": str(policy.model.device)})

    def run(self, training: Iterable[Scenes], held_out: Iterable[Scenes]) -> TrainingLog:
        """Write texts, learn, measure.

        Args:
            training: Windows to learn from.
            held_out: Windows of other clips.

        Raises:
            InputError: One of them gives no text.
        """
        s = self.settings
        started = time.monotonic()
        measured = self._written(held_out, s.held_out, "held out", 15 * s.writing_minutes)
        records = self._written(training, s.texts, "texts", 60 * s.writing_minutes)
        writing_s = time.monotonic() - started
        steps, learning_s = self._learn(records)
        config = self.drafter.config
        self.drafter.requires_grad_(False).eval()
        grams = NGrams(texts_of(records))
        found = {
            "drafter": replay(measured, self.guesser(measured), config.block_size),
            "n-grams": replay(measured, grams.guesser(measured, config.block_size), config.block_size),
        }
        self.log.result = {
            "acceptance": {name: asdict(acceptance) for name, acceptance in found.items()},
            "parameters": sum(p.numel() for p in self.drafter.parameters()),
            "texts": len(records),
            "steps": steps,
            "writing_s": round(writing_s, 1),
            "learning_s": round(learning_s, 1),
        }
        logger.info("\n%s", table(found))
        return self.log

    def save(self, directory: Path) -> None:
        """Write drafter, log and its plot."""
        written = save_drafter(self.drafter, directory / DRAFTER)
        self.log.result["bytes"] = written
        self.log.write(directory)

    def guesser(self, records: TextRecords) -> Guess:
        """The drafter on recorded states, for `replay`."""
        window = torch.arange(self.drafter.config.context_length, device=self.forbidden.device)
        policy = self.recorder.policy
        closing, stop = policy.tokenizer.id("cot_end"), policy.rule.stop
        assert stop is not None

        def guess(rows: Tensor, places: Tensor) -> Tensor:
            context, known = records.states[rows[:, None], places[:, None] + window], records.tokens[rows, places]
            with torch.no_grad():
                guesses = self.drafter.propose(self.language, known, context, self.forbidden)
            # As decoding does: behind the end of the reasoning comes the stop token.
            before = torch.cat((known[:, None], guesses[:, :-1]), dim=1)
            return torch.where(before == closing, stop, guesses)

        return guess

    def _written(self, scenes: Iterable[Scenes], texts: int, name: str, limit_s: float) -> TextRecords:
        parts, started = [], time.monotonic()
        try:
            with tqdm(total=texts, desc=name, unit="text") as bar:
                for records in take(self.recorder, scenes, texts):
                    parts.append(records)
                    bar.update(len(records))
                    if time.monotonic() - started > limit_s:
                        break
        finally:
            if isinstance(scenes, Generator):
                scenes.close()  # ends the processes behind it
        return join_records(parts)

    def _learn(self, records: TextRecords) -> tuple[int, float]:
        s, config, device = self.settings, self.drafter.config, self.forbidden.device
        optimiser = Optimiser(self.drafter.named_parameters(), s.rate, s.decay, matrix_rate=s.matrix_rate)
        generator = torch.Generator(device).manual_seed(s.seed)
        places = anchors(records)
        started, limit_s, clock, step = time.monotonic(), 60 * s.minutes, 0.0, 0
        rows: list[dict[str, Any]] = []
        with tqdm(total=round(limit_s), desc="learning", unit="s") as bar:
            while clock < 1:
                chosen = places[torch.randint(len(places), (s.batch,), device=device, generator=generator)]
                blocks = cut(records, chosen, config.block_size, config.context_length)
                loss, right = block_loss(self.drafter, self.language, blocks, self.forbidden, s.loss)
                loss.backward()
                seconds = time.monotonic() - started
                step += 1
                done = 0.0 if s.steps is None else step / s.steps
                clock = min(1.0, max(seconds / limit_s, done))
                optimiser.step(clock)
                rows.append({"loss": loss.detach(), "first guess right": right[0], "last guess right": right[-1]})
                if step % _LOG_STEPS == 0 or clock >= 1:
                    means = {name: float(value) for name, value in mean_rows(rows).items()}
                    self.log.training.append({"seconds": seconds, "step": float(step), **means})
                    rows = []
                    bar.update(round(seconds) - bar.n)
        optimiser.use_average()
        return step, time.monotonic() - started


def table(found: dict[str, Acceptance]) -> str:
    """Figures side by side, as markdown."""
    places = len(next(iter(found.values())).by_place)
    head = ["", "accept length", "first, at start", "first, later", *(f"{k + 1} right" for k in range(places))]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, a in found.items():
        cells = [name, f"{a.accept_length.mean:.2f} [{a.accept_length.low:.2f}, {a.accept_length.high:.2f}]"]
        cells += [f"{a.first_at_start:.1%}", f"{a.first_later:.1%}", *(f"{p:.1%}" for p in a.by_place)]
        lines.append("| " + " | ".join(cells) + " |")
    first = next(iter(found.values()))
    return "\n".join([*lines, "", f"{first.texts} held-out texts of {first.text_length:.1f} tokens on average."])
