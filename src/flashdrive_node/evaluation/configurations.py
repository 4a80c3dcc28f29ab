"""What a benchmark compares: the engine's ideas alone and together, and what a window takes under each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashdrive_node.engine.flow_schedule import PUBLISHED_8, FlowSchedule
from flashdrive_node.engine.window_plan import Mode, plan_window
from flashdrive_node.evaluation.random_drive import RandomDrive
from flashdrive_node.evaluation.roofline import Workload
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.images import target_size
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.prompt import driving_prompt


@dataclass(frozen=True)
class Configuration:
    """Which of the engine's ideas are on."""

    title: str
    #: What is kept from window to window; None is the plain engine.
    mode: Mode | None = None
    speculative: bool = False
    #: Whether flow steps are left out.
    flow: bool = False
    #: Whether the engine is given the new frames camera by camera; the time counts from the last camera's.
    ahead: bool = False
    #: Whether the drafter is a routine one, which reads parts of the prompt.
    routine: bool = False


#: The rows of FlashDrive's table of latencies, each of the middle ones with the system's work and one idea more; then
#: all of it with nothing approximated in the prefill, and with cameras that come one after the other.
CONFIGURATIONS = {
    "plain": Configuration("plain"),
    "system": Configuration("+ system", "full"),
    "streaming": Configuration("+ streaming", "kv"),
    "speculative": Configuration("+ speculative", "full", speculative=True),
    "flow": Configuration("+ flow", "full", flow=True),
    "all": Configuration("all", "kv", speculative=True, flow=True),
    "features": Configuration("all, exact prefill", "features", speculative=True, flow=True),
    "ahead": Configuration("all, from the last camera", "kv", speculative=True, flow=True, ahead=True),
    "routine": Configuration("all, routine drafter", "kv", speculative=True, flow=True, routine=True),
}


@dataclass(frozen=True)
class Procedure:
    """How a configuration is measured."""

    #: Generated per sample, stop token included.
    tokens: int = 16
    #: Tokens that a speculative round brings: an input, because nobody can tell it of random weights.
    accept_length: float = 5.6
    #: Flow steps of the configurations that leave some out.
    schedule: FlowSchedule = PUBLISHED_8
    #: Windows that are not counted, and windows that are.
    warm_up: int = 3
    runs: int = 20

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, found {getattr(self, name)}"
            for name, least in (("tokens", 2), ("accept_length", 1), ("warm_up", 1), ("runs", 1))
            if not getattr(self, name) >= least
        ]
        if problems:
            raise InputError("benchmark: " + "; ".join(problems))

    @property
    def rounds(self) -> int:
        """Speculative rounds of one text; its first token comes with the prefill."""
        return math.ceil((self.tokens - 1) / self.accept_length)

    @property
    def gain(self) -> int:
        """Tokens that every one of these rounds brings, but for the last."""
        return math.ceil((self.tokens - 1) / self.rounds)


def window_workload(
    loaded: LoadedModel, drive: RandomDrive, configuration: Configuration, procedure: Procedure, samples: int
) -> Workload:
    """What a window of the drive takes behind the first."""
    config, (height, width) = loaded.model.config, drive.image_size
    cameras, frames = len(drive.cameras), drive.frames
    rows, columns = (
        side // config.vision.patch_size
        for side in target_size(height, width, config.min_pixels, config.max_pixels, config.vision.resize_factor)
    )
    grids = [(rows, columns)] * (cameras * frames)
    prompt = driving_prompt(loaded.tokenizer, config, drive.cameras, frames, grids)
    # Every frame but the newest stood one place nearer to the end in the window before.
    moved, still = (*range(1, frames), None), tuple(range(frames))
    sources = (*((still if configuration.ahead else moved,) * (cameras - 1)), moved)
    first = cameras - 1 if configuration.ahead else 0
    plan = plan_window(prompt, sources, configuration.mode or "full", (), torch.device("cpu"), (first, None))
    slots = plan.rows.slots
    steps = config.flow.num_inference_steps
    return Workload(
        samples=samples,
        frame_bytes=len(plan.encode) * height * width * 3,
        patches=(rows * columns,) * len(plan.encode),
        prompt_tokens=len(prompt.ids),
        computed_tokens=len(slots),
        prefill_pairs=int((slots + 1).sum()),
        tokens=procedure.tokens,
        evaluations=len(procedure.schedule.evaluated) if configuration.flow else steps,
        rounds=procedure.rounds if configuration.speculative else None,
    )
