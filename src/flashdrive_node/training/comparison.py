"""Drafters side by side: the same texts, the same budget, before and after reinforcement learning."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.drafter_config import DrafterConfig
from flashdrive_node.engine.protocol import Observation
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.training.aarl import AarlSettings, AarlTrainer, HeldOut
from flashdrive_node.training.acceptance import NGrams, Replayed, gained, replay_texts, texts_of
from flashdrive_node.training.deliberation import deliberation
from flashdrive_node.training.draft_attention import attention_shares
from flashdrive_node.training.draft_replay import DraftingTarget, guesser
from flashdrive_node.training.draft_timing import WARM_UP, time_drafter
from flashdrive_node.training.drafter_files import new_drafter
from flashdrive_node.training.drafter_training import DrafterSettings, DrafterTrainer
from flashdrive_node.training.prompt_views import views_of
from flashdrive_node.training.rollouts import Samples
from flashdrive_node.training.text_records import TextRecorder, TextRecords

logger = logging.getLogger(__name__)

NGRAMS, AARL = "n-grams", " + AARL"


@dataclass(frozen=True)
class Material:
    """What all drafters learn from and are measured on."""

    loaded: LoadedModel
    #: Keeps as many states as the drafter that looks furthest needs.
    recorder: TextRecorder
    training: TextRecords
    validation: HeldOut
    test: HeldOut
    #: One stream of test windows to time, and the engine's settings.
    stream: Sequence[Observation]
    engine: StreamingSettings


class Comparison:
    """Trains and measures one drafter after the other."""

    def __init__(self, material: Material, settings: DrafterSettings):
        """Args: what all have in common; how each learns."""
        self.material, self.settings = material, settings
        #: By name, in the order of measurement.
        self.rows: dict[str, dict[str, Any]] = {}

    def measure_ngrams(self, block_size: int) -> None:
        """The baseline without a network."""
        test = self.material.test.records
        grams = NGrams(texts_of(self.material.training))
        self.rows[NGRAMS] = self._replayed(replay_texts(test, grams.guesser(test, block_size), block_size))

    def train(
        self,
        name: str,
        shape: DrafterConfig,
        directory: Path,
        aarl: AarlSettings | None,
        rollouts: Callable[[], Iterator[Samples]],
    ) -> None:
        """One drafter, from the seed that all have, and then with reinforcement learning if that is wanted.

        Args:
            name: Of its row and directory.
            shape: Architecture.
            directory: New one for its files.
            aarl: None leaves it out.
            rollouts: Begins the windows to learn from anew, the same ones for every drafter.
        """
        material = self.material
        drafter = new_drafter(shape, material.loaded.model, self.settings.seed)
        trainer = DrafterTrainer(material.recorder, drafter, self.settings)
        steps, seconds = trainer.learn(material.training)
        trainer.save(directory / name)
        before = self._replay(drafter)
        self.rows[name] = {"steps": steps, "seconds": round(seconds, 1), **self.measure(drafter, before)}
        logger.info("%s: accept length %.2f", name, self.rows[name]["acceptance"]["accept_length"][0])
        if aarl is None:
            return
        improved = AarlTrainer(material.recorder, copy.deepcopy(drafter), aarl)
        log = improved.run(rollouts(), material.validation, material.test)
        improved.save(directory / f"{name}-aarl")
        ended = {key: log.result[key] for key in ("before", "after", "steps", "seconds", "ended")}
        after = self._replay(improved.drafter)
        ended["gained"] = gained(before, after, material.test.records)
        self.rows[name + AARL] = {"aarl": ended, **self.measure(improved.drafter, after)}

    def measure(self, drafter: Drafter, replayed: Replayed) -> dict[str, Any]:
        """Everything but what belongs to learning, on the test texts, which have been replayed with the drafter."""
        material = self.material
        records = material.test.records
        found = self._replayed(replayed)
        found["parameters"] = sum(p.numel() for p in drafter.parameters())
        found["attention"] = attention_shares(drafter, material.recorder, records, seed=self.settings.seed)
        if len(material.stream) > WARM_UP:
            found["timing"] = asdict(time_drafter(material.loaded, drafter, material.engine, material.stream))
        return found

    def _replay(self, drafter: Drafter) -> Replayed:
        """The test texts, as they are decoded with a drafter."""
        recorder, records = self.material.recorder, self.material.test.records
        target = DraftingTarget.of(recorder)
        views = views_of(records, recorder.prompt, drafter.config, target.room)
        return replay_texts(records, guesser(drafter, target, records, views), drafter.config.block_size)

    def _replayed(self, replayed: Replayed) -> dict[str, Any]:
        records = self.material.test.records
        lengths = records.lengths
        columns = (lengths - replayed.routine, lengths, records.changed.bool(), records.clips)
        deliberative, tokens, changed, clips = (column.cpu().numpy() for column in columns)
        # Streams side by side are recorded in turns; the windows of a clip are to stand together.
        order = np.argsort(clips, kind="stable")
        thought = deliberation(deliberative[order], tokens[order], changed[order], clips[order])
        return {"acceptance": asdict(replayed.acceptance), "deliberation": asdict(thought)}
