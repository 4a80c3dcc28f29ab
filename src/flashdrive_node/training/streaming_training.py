"""Fine-tuning of the action expert to streams: vision and language stay as they are, it learns to read kept keys.

The loss is the flow's own at the end of a rollout, and the distance to what the unchanged expert says of the same
window computed from scratch, at the same noisy actions: that speaks of every direction, the driven path of one.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flashdrive_node.model import batched
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.checkpoint_files import OVERLAY_PREFIXES
from flashdrive_node.model.checkpoint_writer import released
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.safetensors_file import TensorSpec, write_file
from flashdrive_node.model.state_dict import TensorSlot, release_slots
from flashdrive_node.training.losses import flow_errors, flow_places
from flashdrive_node.training.optimiser import Optimiser
from flashdrive_node.training.rollouts import Samples
from flashdrive_node.training.training_log import TrainingLog, mean_rows

logger = logging.getLogger(__name__)

OVERLAY = "expert.safetensors"
_LOG_STEPS = 20
#: Share of the errors summed along the path, as in the training of the model itself.
_PATH_SHARE = 0.15
#: Ends of the lengths of rollouts, windows, that validation tells apart.
_LENGTHS = (1, 4, 16, 64, 1 << 30)


@dataclass(frozen=True)
class StreamingTrainingSettings:
    """Of one run."""

    #: Time at most, and steps at most, which repeat themselves.
    minutes: float
    steps: int | None = None
    #: Noisy actions per sample; batches of samples that are kept, and steps per fresh one.
    draws: int = 4
    kept: int = 8
    reuse: int = 3
    rate: float = 1e-4
    matrix_rate: float = 3e-4
    #: Which of the expert's tensors learn, by patterns of their names in the release's files.
    tensors: tuple[str, ...] = ("*",)
    #: Share of the distillation.
    distil: float = 0.5
    #: Batches that are measured on, before and after.
    validation: int = 24
    seed: int = 0


@dataclass
class StreamingLoss:
    """Losses of a batch, and what they are made of."""

    settings: StreamingTrainingSettings
    teacher: Alpamayo
    generator: torch.Generator

    def __call__(self, model: Alpamayo, samples: Samples) -> tuple[Tensor, dict[str, float]]:
        """What is minimised, and its parts."""
        s = self.settings
        places = flow_places(samples.actions, s.draws, self.generator)
        velocity = batched.velocity_field(model, _fixed(samples.context), s.draws)(places.x, places.times)
        flow, path = flow_errors(velocity - places.velocity)
        parts = {"flow": flow, "path": path}
        loss = flow + _PATH_SHARE * path
        if s.distil and samples.fresh is not None:
            with torch.no_grad():
                wanted = batched.velocity_field(self.teacher, _fixed(samples.fresh), s.draws)(places.x, places.times)
            near, near_path = flow_errors(velocity - wanted)
            parts |= {"distance": near, "distance along the path": near_path}
            loss = (1 - s.distil) * loss + s.distil * (near + _PATH_SHARE * near_path)
        return loss, {name: float(value.detach()) for name, value in parts.items()}


@dataclass
class StreamingTrainer:
    """Trains the expert of a model, in place."""

    model: Alpamayo
    settings: StreamingTrainingSettings
    log: TrainingLog = field(init=False)

    def __post_init__(self) -> None:
        s, device = self.settings, self.model.device
        self.log = TrainingLog({"settings": asdict(s), "device": str(device)})
        # The teacher shares everything but the expert.
        self.teacher = copy.copy(self.model)
        self.teacher._modules = dict(self.model._modules)
        self.teacher.expert = copy.deepcopy(self.model.expert)
        self.model.requires_grad_(False)
        self.slots = expert_slots(self.model.config, s.tensors)
        self._masks = learnt_rows(self.model, self.slots)
        for name in self._masks:
            self.model.get_parameter(name).requires_grad_(True)
        self.generator = torch.Generator(device).manual_seed(s.seed)

    def run(self, training: Iterator[Samples], validation: Iterable[Samples]) -> TrainingLog:
        """Train, and measure on the same held-out samples before and after.

        Raises:
            InputError: One of the two gives no sample.
        """
        held = list(islice(validation, self.settings.validation))
        if not held:
            raise InputError("clips to measure on are required, found no window with truth in them")
        before = self.assess(held)
        steps, seconds = self._train(training)
        self.log.result = {
            "before": before, "after": self.assess(held), "steps": steps, "seconds": round(seconds, 1),
            "samples_held_out": sum(len(samples.lengths) for samples in held),
        }  # fmt: skip
        logger.info("before: %s", before)
        logger.info("after: %s", self.log.result["after"])
        return self.log

    @torch.no_grad()
    def assess(self, held: Iterable[Samples]) -> dict[str, float]:
        """Mean square velocity errors at the same places: of the expert on streams, in all and by the rollout's length,
        and of the unchanged expert on the windows computed from scratch, which is what there is to reach."""
        generator = torch.Generator(self.model.device).manual_seed(self.settings.seed + 1)
        sums: dict[str, list[float]] = {}
        for samples in held:
            places = flow_places(samples.actions, self.settings.draws, generator)

            def errors(model: Alpamayo, context: BatchContext) -> list[float]:
                field_ = batched.velocity_field(model, context, self.settings.draws)
                wrong = field_(places.x, places.times) - places.velocity  # noqa: B023
                return wrong.square().mean(dim=(1, 2, 3)).tolist()

            streamed = errors(self.model, samples.context)
            sums.setdefault("stream", []).extend(streamed)
            if samples.fresh is not None:
                sums.setdefault("from scratch", []).extend(errors(self.teacher, samples.fresh))
            for length, error in zip(samples.lengths.tolist(), streamed, strict=True):
                end = next(e for e in _LENGTHS if length <= e)
                name = f"stream, up to {end} windows" if end < _LENGTHS[-1] else "stream, longer"
                sums.setdefault(name, []).append(error)
        return {name: round(sum(values) / len(values), 5) for name, values in sorted(sums.items())}

    def save(self, directory: Path) -> None:
        """Write the overlay, log and plot."""
        written = save_expert(self.model, directory / OVERLAY, self.slots)
        self.log.result["bytes"] = written
        self.log.write(directory)

    def _train(self, training: Iterator[Samples]) -> tuple[int, float]:
        s = self.settings
        learning = {name: self.model.get_parameter(name) for name in self._masks}
        # Without decay, what has no gradient stays as it is, to the last bit.
        optimiser = Optimiser(learning.items(), s.rate, decay=0.0, matrix_rate=s.matrix_rate)
        loss_of = StreamingLoss(s, self.teacher, self.generator)
        kept: list[Samples] = []
        rows: list[dict[str, float]] = []
        started, limit_s, clock, step = time.monotonic(), 60 * s.minutes, 0.0, 0
        picker = torch.Generator().manual_seed(s.seed)
        with tqdm(total=round(limit_s), desc="streams", unit="s") as bar:
            while clock < 1:
                if step % s.reuse == 0:
                    fresh = next(training, None)
                    if fresh is None:
                        raise InputError("clips to learn from are required, found no window with truth in them")
                    kept = [*kept, fresh][-s.kept :]
                samples = kept[-1] if step % s.reuse == 0 else kept[int(torch.randint(len(kept), (), generator=picker))]
                loss, parts = loss_of(self.model, samples)
                loss.backward()
                for name, parameter in learning.items():
                    if (mask := self._masks[name]) is not None and parameter.grad is not None:
                        parameter.grad *= mask
                step += 1
                seconds = time.monotonic() - started
                clock = min(1.0, max(seconds / limit_s, 0.0 if s.steps is None else step / s.steps))
                optimiser.step(clock)
                rows.append(parts)
                if step % _LOG_STEPS == 0 or clock >= 1:
                    self.log.training.append({"seconds": seconds, "step": float(step), **mean_rows(rows)})
                    rows = []
                    bar.update(round(seconds) - bar.n)
        optimiser.use_average()
        self.model.requires_grad_(False)
        return step, time.monotonic() - started


def expert_slots(config: AlpamayoConfig, patterns: Sequence[str]) -> list[TensorSlot]:
    """Tensors of the expert and its projections whose names in the release's files match one of some patterns.

    Raises:
        InputError: A pattern matches none.
    """
    slots = [s for s in release_slots(config) if s.name.startswith(OVERLAY_PREFIXES) and not s.optional]
    for pattern in patterns:
        if not any(fnmatchcase(slot.name, pattern) for slot in slots):
            raise InputError(f"a pattern of tensors such as {slots[0].name} is required, found {pattern!r}")
    return [slot for slot in slots if any(fnmatchcase(slot.name, pattern) for pattern in patterns)]


def learnt_rows(model: Alpamayo, slots: Sequence[TensorSlot]) -> dict[str, Tensor | None]:
    """Parameters that hold these tensors: which of their rows do, 1 or 0 [rows, 1], or None where all do."""
    masks: dict[str, Tensor | None] = {}
    for target in dict.fromkeys(slot.target for slot in slots):
        parameter, own = model.get_parameter(target), [slot for slot in slots if slot.target == target]
        rows = torch.zeros(len(parameter), *[1] * (parameter.ndim - 1), device=parameter.device, dtype=parameter.dtype)
        for slot in own:
            rows[slot.row : slot.row + slot.shape[0]] = 1
        masks[target] = None if bool(rows.all()) else rows
    return masks


def save_expert(model: Alpamayo, path: Path, slots: Sequence[TensorSlot] | None = None) -> int:
    """Write tensors of the expert and its projections, by default all, under the release's names in their own types.

    Returns:
        Bytes of tensor data.

    Raises:
        CheckpointError: The file exists.
    """
    if path.exists():
        raise CheckpointError(str(path), ["a new file is required, found one"])
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.named_parameters())
    chosen = expert_slots(model.config, ("*",)) if slots is None else slots
    specs = [TensorSpec(s.name, s.shape, tensors[s.target].dtype, partial(released, s, tensors)) for s in chosen]
    return write_file(path, specs)


def _fixed(context: BatchContext) -> BatchContext:
    """The context without a graph behind it, and not to be extended."""
    keys, values = ([t.detach() for t in tensors] for tensors in (context.keys, context.values))
    return replace(context, keys=keys, values=values)
