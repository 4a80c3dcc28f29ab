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
from tqdm import tqdm

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.training.acceptance import Acceptance, NGrams, replay, texts_of
from flashdrive_node.training.draft_replay import DraftingTarget, acceptance_of
from flashdrive_node.training.drafter_files import save_draft_vocabulary, save_drafter, trainable
from flashdrive_node.training.drafter_loss import BlockLoss, anchors, block_loss, cut
from flashdrive_node.training.optimiser import Optimiser
from flashdrive_node.training.prompt_views import views_of
from flashdrive_node.training.text_records import TextRecorder, TextRecords, join_records
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
            recorder: Of the target, with the drafter's layers and as many states as it looks at.
            drafter: New or trained before, on the target's device; every part of it is trained on.
            settings: Of the run.
        """
        self.recorder, self.settings = recorder, settings
        self.drafter = trainable(drafter)
        self.target = DraftingTarget.of(recorder)
        #: Tokens of the texts that were learnt from, ascending: int64, on the host.
        self.vocabulary = torch.empty(0, dtype=torch.int64)
        device = str(recorder.policy.model.device)
        self.log = TrainingLog({"settings": asdict(settings), "drafter": drafter.config.variant, "device": device})

    def run(self, training: Iterable[TextRecords], held_out: Iterable[TextRecords]) -> TrainingLog:
        """Have texts written, learn, measure.

        Args:
            training: Records to learn from, without end or few.
            held_out: Of other clips.

        Raises:
            InputError: One of them gives no text.
        """
        s = self.settings
        started = time.monotonic()
        measured = collect(held_out, s.held_out, "held out", 15 * s.writing_minutes)
        records = collect(training, s.texts, "texts", 60 * s.writing_minutes)
        writing_s = time.monotonic() - started
        steps, learning_s = self.learn(records)
        grams, block = NGrams(texts_of(records)), self.drafter.config.block_size
        found = {
            "drafter": acceptance_of(self.drafter, self.recorder, measured),
            "n-grams": replay(measured, grams.guesser(measured, block), block),
        }
        self.vocabulary = records.tokens[records.tokens >= 0].unique().cpu()
        said = measured.tokens[measured.tokens >= 0]
        self.log.result = {
            "acceptance": {name: asdict(acceptance) for name, acceptance in found.items()},
            "vocabulary": len(self.vocabulary),
            "vocabulary_covers": float(torch.isin(said, self.vocabulary.to(said.device)).double().mean()),
            "parameters": sum(p.numel() for p in self.drafter.parameters()),
            "texts": len(records),
            "steps": steps,
            "writing_s": round(writing_s, 1),
            "learning_s": round(learning_s, 1),
        }
        logger.info("\n%s", table(found))
        return self.log

    def save(self, directory: Path, own_vocabulary: bool = False) -> None:
        """Write drafter, log and its plot; `own_vocabulary` has it guess tokens of the texts it learnt from alone."""
        written = save_drafter(self.drafter, directory / DRAFTER)
        if own_vocabulary:
            save_draft_vocabulary(self.vocabulary, directory / DRAFTER)
        self.log.result["bytes"] = written
        self.log.write(directory)

    def learn(self, records: TextRecords) -> tuple[int, float]:
        """Learn from these texts until steps or time are used up, and leave the drafter for use: steps and seconds."""
        s, config, target = self.settings, self.drafter.config, self.target
        device = target.forbidden.device
        optimiser = Optimiser(self.drafter.named_parameters(), s.rate, s.decay, matrix_rate=s.matrix_rate)
        generator = torch.Generator(device).manual_seed(s.seed)
        places = anchors(records)
        views = views_of(records, self.recorder.prompt, config, target.room)
        started, limit_s, clock, step = time.monotonic(), 60 * s.minutes, 0.0, 0
        rows: list[dict[str, Any]] = []
        with tqdm(total=round(limit_s), desc="learning", unit="s") as bar:
            while clock < 1:
                chosen = places[torch.randint(len(places), (s.batch,), device=device, generator=generator)]
                blocks = cut(records, chosen, config.block_size, config.context_length, views)
                loss, right = block_loss(self.drafter, target.language, blocks, target.forbidden, s.loss)
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
        self.drafter.requires_grad_(False).eval()
        return step, time.monotonic() - started


def collect(parts: Iterable[TextRecords], texts: int, name: str, limit_s: float = math.inf) -> TextRecords:
    """Records of so many texts, or of what is written in this time.

    Raises:
        InputError: There is none.
    """
    found, count, started = [], 0, time.monotonic()
    try:
        with tqdm(total=texts, desc=name, unit="text") as bar:
            for records in parts:
                found.append(records)
                count += len(records)
                bar.update(len(records))
                if count >= texts or time.monotonic() - started > limit_s:
                    break
    finally:
        if isinstance(parts, Generator):
            parts.close()  # ends the processes behind it
    return join_records(found)


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
