"""Deployment settings of the engines; the architecture comes with the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import DTYPES
from flashdrive_node.model.precision import PRESETS, StagePrecision
from flashdrive_node.model.sampling import SamplingSettings


@dataclass(frozen=True)
class PlainSettings:
    """Settings of the plain engine."""

    #: Local directory or Hugging Face id.
    checkpoint: str
    revision: str | None = None
    allow_download: bool = False
    #: Fine-tuned expert to put over the checkpoint's.
    overlay: Path | None = None
    #: "auto" takes a GPU where there is one.
    device: str = "auto"
    #: A type, a preset or "STAGE=FORMAT,..." (`StagePrecision.parse`). "auto" is bfloat16 on a GPU, with 8-bit layers
    #: where that does not fit, and float32 on the CPU.
    precision: str = "auto"
    samples: int = 1
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    #: Scale of the flow's starting noise.
    noise_temperature: float = 1.0
    #: Flow steps; None takes the checkpoint's number.
    flow_steps: int | None = None
    #: Weight of navigation guidance; 1 is off, and costs nothing.
    guidance_weight: float = 1.0
    #: Window k of a stream draws with seed + k, so a replay repeats itself.
    seed: int = 0
    #: What the warm-up window looks like: camera indices, frames of each, height and width in pixels.
    cameras: tuple[int, ...] = (0, 1, 2, 6)
    frames: int = 4
    image_size: tuple[int, int] = (1080, 1920)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, found {self.samples}")
        try:
            _ = self.stages
        except InputError as error:
            raise InputError(
                f"precision must be one of {', '.join(['auto', *DTYPES, *PRESETS])} or STAGE=FORMAT,..., "
                f"found {self.precision!r}: {error}"
            ) from error

    @property
    def torch_device(self) -> torch.device:
        """The device that "auto" stands for.

        Raises:
            InputError: PyTorch knows no such device.
        """
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise InputError(f"device: auto, cpu, cuda or cuda:NUMBER is required, found {name!r}") from error

    @property
    def dtype(self) -> torch.dtype:
        """The type that "auto" stands for."""
        if self.precision in DTYPES:
            return DTYPES[self.precision]
        return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32

    @property
    def stages(self) -> StagePrecision | None:
        """Formats of the stages; None where only a type is named, which leaves them to the checkpoint."""
        return None if self.precision in ("auto", *DTYPES) else StagePrecision.parse(self.precision)


@dataclass(frozen=True)
class StreamingSettings(PlainSettings):
    """Settings of the streaming engine."""

    #: What is kept from window to window.
    stream: StreamSettings = field(default_factory=StreamSettings)
    #: Which flow steps are evaluated; None evaluates all `flow_steps`.
    schedule: FlowSchedule | None = None
    #: Directory of a drafter of either variant; None decodes one token at a time.
    drafter: Path | None = None
    #: Guesses are checked in blocks as long as the drafter is sure of, with this probability at least; 0 checks whole
    #: blocks always.
    draft_confidence: float = 0.0
    #: One text for all samples, which then differ by their starting noise alone; else each has its own.
    shared_text: bool = False
    #: On a GPU, run every stage as a captured graph.
    graphs: bool = True
    #: Frames will come ahead of their windows (`StreamingEngine.ingest`): the warm-up does that too.
    frames_ahead: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None and self.flow_steps is not None:
            raise InputError("flow_steps and schedule exclude each other, found both")
        if not 0 <= self.draft_confidence < 1:
            raise InputError(f"draft_confidence must be 0 (off) to less than 1, found {self.draft_confidence}")
