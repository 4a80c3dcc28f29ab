"""Training of the small model: windows are rendered, kept for a while, and learnt from, all on one device per rank."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed
from tqdm import tqdm

from flashdrive_node.engine.batched_policy import RELEASE_CAMERAS, BatchedPolicy
from flashdrive_node.evaluation.history_baseline import FILE_NAME, HistoryBaseline
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.prompt_batch import PromptLayout
from flashdrive_node.model.tokenizer import AlpamayoTokenizer
from flashdrive_node.training.architecture import IMAGE_SIZE
from flashdrive_node.training.assessment import assess
from flashdrive_node.training.closed_loop_supply import ClosedLoopSupply, LoopSettings
from flashdrive_node.training.drives import DriveJob
from flashdrive_node.training.losses import AuxiliaryHeads, losses, total
from flashdrive_node.training.optimiser import Optimiser
from flashdrive_node.training.pictures import Photographer, retouch
from flashdrive_node.training.replay_buffer import Batch, ReplayBuffer, Scribe
from flashdrive_node.training.source import WindowSource
from flashdrive_node.training.supply import DriveSupply, MixedSupply, Supply
from flashdrive_node.training.training_log import Stopwatch, TrainingLog, mean_rows
from flashdrive_node.training.windows import Windows, join
from flashdrive_node.world.frames import FRAMES

logger = logging.getLogger(__name__)

#: Names of a run's parts in its directory.
CHECKPOINT, HEADS_FILE = "checkpoint", "auxiliary_heads.safetensors"
#: Largest file of weights: what repositories take without further measures.
_SHARD_BYTES = 15 * 2**20
#: Steps between two rows of the log, and between two looks at the clock of all ranks.
_LOG_STEPS, _CLOCK_STEPS = 50, 8
#: Learning rate of matrices over that of everything else.
_MATRIX_RATE = 10 / 3
#: Seconds between two validations.
_VALIDATION_S = 60.0


@dataclass(frozen=True)
class TrainingSettings:
    """Of one stage."""

    #: Time of training, behind start-up.
    minutes: float
    #: Samples per step and rank, noisy actions per sample, and how often a window is used on average.
    batch: int = 96
    draws: int = 4
    reuse: float = 2.5
    rate: float = 1.2e-3
    seed: int = 0
    #: Windows that are kept, those that are rendered at a time, and those before the first step.
    buffer: int = 16384
    chunk: int = 64
    first: int = 1024
    #: Processes that compute drives, per rank; scenes per drive, its length, and windows of each.
    workers: int = 8
    scenes: int = 512
    drive_steps: int = 200
    windows_per_scene: int = 2
    #: Share of the windows that come from the model's own drives, and the temperature of its reasoning there.
    own_drives: float = 0.0
    temperature: float = 0.6
    #: Windows of the validation split.
    validation: int = 512
    #: Compile the renderer, and the layers of the networks.
    compiled_pictures: bool = True
    compiled_layers: bool = False


@dataclass(frozen=True)
class Rank:
    """This process among those that train together."""

    index: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that logs and saves."""
        return self.index == 0


class VlaTrainer:
    """One stage of training."""

    def __init__(
        self,
        model: Alpamayo,
        heads: AuxiliaryHeads,
        tokenizer: AlpamayoTokenizer,
        settings: TrainingSettings,
        rank: Rank | None = None,
        baseline: HistoryBaseline | None = None,
    ):
        """Prepare; nothing is computed yet.

        Args:
            model, heads: To be trained, on the device and of the type that computes.
            tokenizer: The model's.
            settings: Of this stage.
            rank: This process.
            baseline: To be trained on the same windows; by default a new one.
        """
        self.model, self.heads, self.tokenizer, self.settings = model, heads, tokenizer, settings
        self.rank = rank or Rank()
        self.device = model.device
        grid = (IMAGE_SIZE[1] // 16, IMAGE_SIZE[0] // 16)
        self.layout = PromptLayout(tokenizer, model.config, RELEASE_CAMERAS, FRAMES, grid, self.device)
        self.scribe = Scribe(self.layout, model, tokenizer)
        self.photographer = Photographer(settings.chunk, compiled=settings.compiled_pictures)
        self.buffer = ReplayBuffer(settings.buffer)
        self.generator = torch.Generator(self.device).manual_seed(1000 * settings.seed + self.rank.index)
        ends = ((f"heads.{name}", parameter) for name, parameter in heads.named_parameters())
        self.optimiser = Optimiser(
            [*model.named_parameters(), *ends], settings.rate, matrix_rate=settings.rate * _MATRIX_RATE
        )
        self.baseline = (baseline or HistoryBaseline(model.config.action_space)).to(self.device)
        self.baseline_optimiser = torch.optim.AdamW(self.baseline.parameters(), lr=1e-3, weight_decay=1e-3)
        self.log = TrainingLog({"settings": asdict(settings), "ranks": self.rank.count, "device": _device_name(model)})
        if settings.compiled_layers:
            compile_layers(model)

    def run(self) -> TrainingLog:
        """Train for the time that is set, and measure the averaged weights, which stay in the model."""
        s = self.settings
        source = WindowSource(self._job("train", s.scenes), s.workers, self.rank.index, self.rank.count)
        try:
            started = time.monotonic()
            validation = self._validation() if self.rank.first else None
            supply = self._supply(source)
            while self.buffer.written < min(s.first, s.buffer):
                self.buffer.add(supply().samples)
            self._synchronise()
            self.log.conditions["start_up_s"] = time.monotonic() - started
            if self.rank.first:
                logger.info("started after %.0f s", self.log.conditions["start_up_s"])
            self._loop(supply, validation)
        finally:
            source.close()
        self.optimiser.use_average()
        if validation is not None:
            windows, samples = validation
            self._validate(samples, s.minutes * 60)
            policy = BatchedPolicy(self.model, self.tokenizer, seed=s.seed)
            # Other shapes than in training would all be compiled anew.
            with torch.compiler.set_stance("force_eager"):
                self.log.result |= assess(policy, self.baseline, windows, samples)
        return self.log

    def _job(self, split: str, scenes: int) -> DriveJob:
        s = self.settings
        # Runs of different seeds drive different scenes.
        return DriveJob(split, s.seed * 10**9, scenes, scenes * s.windows_per_scene, s.seed, s.drive_steps)

    def _validation(self) -> tuple[Windows, Batch]:
        """Windows that are never trained on, with their samples."""
        s = self.settings
        source = WindowSource(self._job("validation", s.validation), workers=0)
        windows = next(source).to(self.device)
        rows = torch.arange(min(s.validation, len(windows)), device=self.device)
        parts = [windows.rows(part) for part in rows.split(s.chunk)]
        samples = [self.scribe.write(part, self.photographer.shoot(part)) for part in parts]
        return join(*parts), Batch(*(torch.cat(column) for column in zip(*samples, strict=True)))

    def _supply(self, source: WindowSource) -> Supply:
        drives = DriveSupply(source, self.photographer, self.scribe)
        s = self.settings
        if not s.own_drives:
            return drives
        scenes = FRAMES * s.chunk
        # Behind the scenes of the other supply.
        first = s.seed * 10**9 + 5 * 10**8 + self.rank.index * scenes
        loop = LoopSettings(first, self.rank.count * scenes, s.seed)
        policy = BatchedPolicy(self.model, self.tokenizer, temperature=s.temperature, seed=s.seed + self.rank.index)
        own = ClosedLoopSupply(policy, self.photographer, self.scribe, loop, self.optimiser.averaged)
        return MixedSupply([(drives, 1 - s.own_drives), (own, s.own_drives)])

    def _loop(self, supply: Supply, validation: tuple[Windows, Batch] | None) -> None:
        s = self.settings
        seconds, owed = 60 * s.minutes, 0.0
        rows: list[dict[str, torch.Tensor]] = []
        started, validated = time.monotonic(), 0.0
        shared = torch.zeros((), device=self.device)
        watch = Stopwatch(self.device)
        self.log.conditions["seconds"] = watch.means
        with tqdm(total=round(seconds), unit="s", disable=not self.rank.first, mininterval=5.0) as bar:
            while True:
                with watch.part("fresh windows"):
                    fresh = supply()
                    self.buffer.add(fresh.samples)
                owed += s.reuse * fresh.nominal / s.batch
                while owed >= 1.0:
                    owed -= 1.0
                    with watch.part("step"):
                        row, shared = self._step((time.monotonic() - started) / seconds)
                    rows.append(row)
                    if len(rows) == _LOG_STEPS:
                        self._log(rows, time.monotonic() - started, bar)
                        rows = []
                    if self.optimiser.steps % _CLOCK_STEPS == 0 and float(shared) >= 1.0:
                        return
                passed = time.monotonic() - started
                if validation is not None and passed > validated + _VALIDATION_S:
                    validated = passed
                    with self.optimiser.averaged():
                        self._validate(validation[1], passed)

    def _step(self, clock: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One update: losses and gradient norm, and the clock of all ranks, scalars on the device."""
        batch = self.buffer.sample(self.settings.batch, self.generator)
        batch = batch._replace(images=retouch(batch.images, self.generator))
        parts = losses(self.model, self.heads, batch, self.layout, self.settings.draws, self.generator)
        total(parts).backward()
        norm, shared = self.optimiser.step(clock)
        blind = self.baseline.loss(batch.history_xyz, batch.history_rot, batch.route, batch.speed, batch.actions)
        blind.backward()
        self.baseline_optimiser.step()
        self.baseline_optimiser.zero_grad()
        figures = parts | {"gradient": norm, "history baseline": blind}
        return {name: value.detach() for name, value in figures.items()}, shared

    def _log(self, rows: list[dict[str, torch.Tensor]], seconds: float, bar: tqdm) -> None:
        # One transfer for all: reading a value waits for the device.
        values = torch.stack([torch.stack(list(row.values())) for row in rows]).mean(dim=0).tolist()
        row = dict(zip(rows[0], values, strict=True))
        self.log.training.append({"seconds": seconds, "step": self.optimiser.steps, **row})
        bar.update(max(0, round(min(seconds, 60 * self.settings.minutes) - bar.n)))
        bar.set_postfix(step=self.optimiser.steps, text=f"{row['text']:.3f}", flow=f"{row['flow']:.3f}")

    @torch.no_grad()
    def _validate(self, samples: Batch, seconds: float) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        rows = []
        for part in torch.arange(len(samples.lengths), device=self.device).split(self.settings.batch):
            batch = Batch(*(column[part] for column in samples))
            with torch.compiler.set_stance("force_eager"):
                parts = losses(self.model, self.heads, batch, self.layout, self.settings.draws, generator)
            rows.append({name: float(value) for name, value in parts.items()})
        self.log.validation.append({"seconds": seconds, "step": self.optimiser.steps, **mean_rows(rows)})

    def _synchronise(self) -> None:
        """Wait for all ranks, so that their clocks start together."""
        if distributed.is_initialized():
            distributed.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def save(self, directory: Path, tokenizer_files: Path) -> None:
        """Write checkpoint, baseline, auxiliary heads and log into a directory that has none of them."""
        directory.mkdir(parents=True, exist_ok=True)
        save_checkpoint(
            self.model,
            self.model.config,
            directory / CHECKPOINT,
            max_shard_bytes=_SHARD_BYTES,
            tokenizer_files_dir=tokenizer_files,
        )
        self.baseline.save(directory / FILE_NAME)
        heads = {name: t.detach().float().cpu().contiguous() for name, t in self.heads.state_dict().items()}
        save_file(heads, directory / HEADS_FILE)
        self.log.write(directory)


def _device_name(model: Alpamayo) -> str:
    name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return f"{name}, torch {torch.__version__}"


def compile_layers(model: Alpamayo) -> None:
    """Fuse what stands between the matrix products of a layer."""
    for block in model.vision.blocks:
        block.compile(dynamic=False)
    for layer in (*model.language.layers, *model.expert.layers):
        compiled: Any = layer
        compiled.project = torch.compile(compiled.project, dynamic=False)
        compiled.finish = torch.compile(compiled.finish, dynamic=False)
