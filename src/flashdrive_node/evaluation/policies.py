"""Who plans in the world: the model, and what it is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashdrive_node.bundled import BUNDLED, bundled_checkpoint
from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.plain import medoid
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.closed_loop import Observation
from flashdrive_node.evaluation.history_baseline import FILE_NAME as HISTORY_FILE
from flashdrive_node.evaluation.history_baseline import HistoryBaseline, load_history_baseline
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import load_alpamayo
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
    loaded = load_alpamayo(
        settings.checkpoint,
        settings.torch_device,
        settings.dtype,
        overlay=settings.overlay,
        precision=settings.stages,
        hash_files=False,
    )
    steps = settings.flow_steps or loaded.model.config.flow.num_inference_steps
    policy = BatchedPolicy(
        loaded.model,
        loaded.tokenizer,
        samples=settings.samples,
        temperature=settings.sampling.temperature,
        flow_steps=steps,
        seed=settings.seed,
        max_length=settings.sampling.max_length,
    )
    return ModelPolicy(policy, batch)


def history_file(checkpoint: str) -> Path | None:
    """The history baseline that was trained with a checkpoint: in its directory or beside it."""
    directory = bundled_checkpoint() if checkpoint == BUNDLED else Path(checkpoint)
    places = (directory / HISTORY_FILE, directory.parent / HISTORY_FILE)
    return next((place for place in places if place.is_file()), None)


class ConstantVelocity:
    """Straight on at the present speed."""

    name = CONSTANT_VELOCITY
    sees = False

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

    def plan(self, observation: Observation) -> Plans:
        """See `Policy`; of several samples the one nearest to all others is driven.

        Raises:
            InputError: The observation has no pictures.
        """
        if observation.images is None:
            raise InputError("the model needs pictures, found an observation without")
        parts = []
        for first in range(0, len(observation.navigation), self.batch):
            rows = slice(first, first + self.batch)
            parts.append(
                self.policy.plan(
                    observation.images[rows],
                    observation.history_xyz[rows],
                    observation.history_rot[rows],
                    observation.navigation[rows],
                )
            )
        xy = torch.cat([part.xyz for part in parts])[..., :2].float()
        yaw, speed = (torch.cat([getattr(part, name) for part in parts]).float() for name in ("yaw", "speed"))
        return Plans(xy, yaw, speed, medoid(xy), [text for part in parts for text in part.texts])


def _first(t: Tensor) -> Tensor:
    return torch.zeros(len(t), dtype=torch.int64, device=t.device)
