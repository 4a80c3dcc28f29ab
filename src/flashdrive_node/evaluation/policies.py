"""Who plans in the world: the model, and what it is measured against."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashdrive_node.bundled import BUNDLED, bundled_checkpoint
from flashdrive_node.engine.batched_policy import BatchedPolicy, Plan, StreamingPolicy
from flashdrive_node.engine.prediction import medoid
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.evaluation.closed_loop import Observation
from flashdrive_node.evaluation.history_baseline import FILE_NAME as HISTORY_FILE
from flashdrive_node.evaluation.history_baseline import HistoryBaseline, load_history_baseline
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.world.episode import FUTURE
from flashdrive_node.world.scene import DT_S


class Plans(NamedTuple):
    """What a policy wants to do in S scenes, n trajectories each, in the vehicle frame at t0, at 0.1 s, 0.2 s, ..."""

    #: [S, n, 64, 2], metres.
    xy: Tensor
    #: [S, n, 64], radians and m/s.
    yaw: Tensor
    speed: Tensor
    #: Which one is driven [S].
    chosen: Tensor
    #: Reasoning per scene; None from a policy that gives none.
    texts: list[str] | None = None

    def driven(self) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen trajectories: xy [S, 64, 2], yaw and speed [S, 64]."""
        rows = torch.arange(len(self.chosen), device=self.chosen.device)
        xy, yaw, speed = (t[rows, self.chosen] for t in (self.xy, self.yaw, self.speed))
        return xy, yaw, speed


class Policy(Protocol):
    """Plans from what the sensors say."""

    name: str
    #: Whether the observation must hold pictures.
    sees: bool

    def begin(self) -> None:
        """Drives of other scenes follow: nothing of the last ones may be kept."""
        ...

    def plan(self, observation: Observation) -> Plans:
        """A plan per scene."""
        ...


#: Who may drive; the expert itself, which plans nothing, is made by nobody.
EXPERT, CONSTANT_VELOCITY, HISTORY, MODEL = "expert", "constant-velocity", "history", "model"
POLICIES = (MODEL, HISTORY, CONSTANT_VELOCITY, EXPERT)


def make_policy(name: str, settings: PlainSettings, batch: int) -> Policy | None:
    """A policy by name, None for the expert.

    Args:
        name: Of `POLICIES`.
        settings: Of the model: checkpoint, device, sampling.
        batch: Scenes that the model gets at once.

    Raises:
        InputError: No such policy, or the checkpoint has no history baseline.
        ModelError: The checkpoint cannot be loaded.
    """
    if name == EXPERT:
        return None
    if name == CONSTANT_VELOCITY:
        return ConstantVelocity()
    if name == HISTORY:
        file = history_file(settings.checkpoint)
        if file is None:
            raise InputError(f"{HISTORY_FILE} is required in {settings.checkpoint} or beside it, found none")
        return HistoryOnly(load_history_baseline(file, settings.torch_device))
    if name != MODEL:
        raise InputError(f"a policy of {', '.join(POLICIES)} is required, found {name!r}")
    return model_policy(loaded_by(settings), settings, batch)


def weights_of(settings: PlainSettings) -> Hashable:
    """Equal for settings that `loaded_by` gives the same model."""
    return settings.checkpoint, settings.overlay, settings.precision


def loaded_by(settings: PlainSettings) -> LoadedModel:
    """The checkpoint that settings name.

    Raises:
        ModelError: It cannot be loaded.
    """
    return load_alpamayo(
        settings.checkpoint,
        settings.torch_device,
        settings.dtype,
        overlay=settings.overlay,
        precision=settings.stages,
        hash_files=False,
    )


def model_policy(loaded: LoadedModel, settings: PlainSettings, batch: int) -> ModelPolicy:
    """The model as the engine of these settings runs it, some scenes at a time; without drafter and graphs."""
    policy = batched_policy(loaded, settings)
    if isinstance(settings, StreamingSettings):
        return StreamingModelPolicy(StreamingPolicy(policy, settings.stream), batch)
    return ModelPolicy(policy, batch)


def batched_policy(loaded: LoadedModel, settings: PlainSettings, own_texts: bool = False) -> BatchedPolicy:
    """How the engine of these settings reasons and plans, for many windows."""
    return BatchedPolicy(
        loaded.model,
        loaded.tokenizer,
        samples=settings.samples,
        temperature=settings.sampling.temperature,
        flow_steps=settings.flow_steps or loaded.model.config.flow.num_inference_steps,
        seed=settings.seed,
        cameras=settings.cameras,
        max_length=settings.sampling.max_length,
        schedule=settings.schedule if isinstance(settings, StreamingSettings) else None,
        own_texts=own_texts,
    )


def history_file(checkpoint: str) -> Path | None:
    """The history baseline that was trained with a checkpoint: in its directory or beside it."""
    directory = bundled_checkpoint() if checkpoint == BUNDLED else Path(checkpoint)
    places = (directory / HISTORY_FILE, directory.parent / HISTORY_FILE)
    return next((place for place in places if place.is_file()), None)


class ConstantVelocity:
    """Straight on at the present speed."""

    name = CONSTANT_VELOCITY
    sees = False

    def begin(self) -> None:
        """See `Policy`; nothing is ever kept."""

    def plan(self, observation: Observation) -> Plans:
        """See `Policy`."""
        speed = observation.speed.float()[:, None, None].expand(-1, 1, FUTURE)
        forward = speed * DT_S * torch.arange(1, FUTURE + 1, device=speed.device)
        still = torch.zeros_like(forward)
        return Plans(torch.stack((forward, still), dim=-1), still, speed, _first(speed))


class HistoryOnly:
    """The baseline without eyes: ego history and navigation instruction."""

    name = HISTORY
    sees = False

    def __init__(self, baseline: HistoryBaseline):
        """Keep the network."""
        self.baseline = baseline

    def begin(self) -> None:
        """See `Policy`; nothing is ever kept."""

    def plan(self, observation: Observation) -> Plans:
        """See `Policy`."""
        path = self.baseline.plan(observation.history_xyz, observation.history_rot, observation.navigation)
        return Plans(path.xyz[:, None, :, :2], path.yaw[:, None], path.speed[:, None], _first(path.yaw))


class ModelPolicy:
    """Alpamayo, some scenes at a time."""

    name = MODEL
    sees = True

    def __init__(self, policy: BatchedPolicy, batch: int):
        """Keep a policy and the number of scenes that it gets at once."""
        self.policy, self.batch = policy, batch

    def begin(self) -> None:
        """See `Policy`; every window is computed from scratch."""

    def plan(self, observation: Observation) -> Plans:
        """See `Policy`; of several samples the one nearest to all others is driven.

        Raises:
            InputError: The observation has no pictures.
        """
        if observation.images is None:
            raise InputError("the model needs pictures, found an observation without")
        count = len(observation.navigation)
        runs = [range(first, min(first + self.batch, count)) for first in range(0, count, self.batch)]
        parts = [self._answer(observation, observation.images, rows) for rows in runs]
        xy = torch.cat([part.xyz for part in parts])[..., :2].float()
        yaw, speed = (torch.cat([getattr(part, name) for part in parts]).float() for name in ("yaw", "speed"))
        return Plans(xy, yaw, speed, medoid(xy), [text for part in parts for text in part.texts])

    def _answer(self, observation: Observation, images: Tensor, rows: range) -> Plan:
        """Plans of some scenes."""
        at = slice(rows.start, rows.stop)
        return self.policy.plan(
            images[at], observation.history_xyz[at], observation.history_rot[at], observation.navigation[at]
        )


class StreamingModelPolicy(ModelPolicy):
    """Alpamayo over streams, one per scene: what the streaming engine does in each of them."""

    def __init__(self, streaming: StreamingPolicy, batch: int):
        """Keep the streams' policy and the number of scenes that it gets at once."""
        super().__init__(streaming.policy, batch)
        self.streaming = streaming

    def begin(self) -> None:
        """See `Policy`; the streams of all scenes begin anew with the first plan."""
        self.streaming.streams = None

    def _answer(self, observation: Observation, images: Tensor, rows: range) -> Plan:
        cameras, frames, height, width = images.shape[1:5]
        if len(observation.stamps_ns) != frames:
            raise InputError(f"a stamp for each of {frames} frames is required, found {observation.stamps_ns}")
        if self.streaming.streams is None:
            self.streaming.begin(len(images), frames, height, width)
        at = slice(rows.start, rows.stop)
        shown = images[at].flatten(1, 2)

        def chosen(some: Sequence[int], which: Sequence[int]) -> Tensor:
            return shown[torch.tensor(some, device=shown.device)[:, None], torch.tensor(which, device=shown.device)]

        return self.streaming.plan(
            rows,
            [(observation.stamps_ns,) * cameras] * len(rows),
            chosen,
            observation.history_xyz[at],
            observation.history_rot[at],
            observation.navigation[at],
        )


def _first(t: Tensor) -> Tensor:
    return torch.zeros(len(t), dtype=torch.int64, device=t.device)
