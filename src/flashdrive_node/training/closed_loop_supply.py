"""Windows from the model's own drives, labelled with what the expert would do there (DAgger, arXiv 1011.0686)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.training.drives import label
from flashdrive_node.training.pictures import Photographer, Pictures
from flashdrive_node.training.replay_buffer import Scribe
from flashdrive_node.training.supply import Fresh
from flashdrive_node.training.windows import Windows, join
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import HISTORY, relative_poses
from flashdrive_node.world.expert import Cause, Decision, decide
from flashdrive_node.world.faults import faults
from flashdrive_node.world.frames import FRAMES
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, Scene, move, select
from flashdrive_node.world.sight import EVIDENCE_STEPS, Sight, recent, sight
from flashdrive_node.world.simulation import advance
from flashdrive_node.world.state import State, first_state
from flashdrive_node.world.steering import Manoeuvre
from flashdrive_node.world.wording import navigation


@dataclass(frozen=True)
class LoopSettings:
    """How the model drives while windows are collected."""

    #: First scene of the training split, and how far the next scenes are from it.
    first: int
    stride: int
    seed: int
    #: Length of a drive, steps.
    steps: int = 200
    #: Steps between two plans, and plans between two deliveries.
    replan: int = 2
    plans: int = 16
    #: Share of the scenes whose moments are kept per plan.
    keep: float = 0.4
    #: Share of the time in which the expert drives, and mean time until that changes, seconds.
    expert: float = 0.25
    turn_s: float = 4.0
    #: A kind of moment is kept in proportion to its count to the power of one less this.
    balance: float = 0.7


class _Moments(NamedTuple):
    """Moments that are kept, until they are labelled together."""

    scene: Scene
    history: tuple[State, ...]
    seen: Sight
    pictures: Pictures


class ClosedLoopSupply:
    """Scenes in lock-step that the present model drives most of the time."""

    def __init__(
        self,
        policy: BatchedPolicy,
        photographer: Photographer,
        scribe: Scribe,
        settings: LoopSettings,
        weights: Callable[[], AbstractContextManager[None]],
    ):
        """Prepare; scenes are chosen when samples are asked for.

        Args:
            policy: The model that is trained.
            photographer: Its batch, times the frames, is the number of scenes.
            scribe: Writes the samples.
            settings: Of the drives.
            weights: Puts those weights into the model that drive.
        """
        self.policy, self.photographer, self.scribe, self.settings = policy, photographer, scribe, settings
        self.weights = weights
        self.scenes = FRAMES * photographer.batch
        self.rng = np.random.default_rng((settings.seed, settings.first))
        self._next = settings.first
        self._left = 0
        self._counts = torch.ones(len(Cause) * len(Manoeuvre), device=scribe.layout.device)
        self._parts: list[_Moments] = []

    @torch.no_grad()
    def __call__(self) -> Fresh:
        """See `Supply`: the moments kept in `plans` plans that the expert can go on from without a fault."""
        with self.weights():
            for _ in range(self.settings.plans):
                if self._left < self.settings.replan:
                    self._begin()
                self._plan_and_drive()
        windows, pictures = self._labelled()
        return Fresh(self.scribe.write(windows, pictures), self.settings.plans * self._kept)

    @property
    def _kept(self) -> int:
        return max(1, round(self.settings.keep * self.scenes))

    def _begin(self) -> None:
        """New scenes, driven by the expert until there is a history."""
        device = self.scribe.layout.device
        indices = np.arange(self._next, self._next + self.scenes)
        self._next += self.settings.stride
        self.scene = move(sample_scenes(scene_keys("train", indices)), device)
        self.states = deque([first_state(self.scene)], maxlen=HISTORY)
        self.sights: deque[Sight] = deque(maxlen=EVIDENCE_STEPS)
        self.views: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=FRAMES)
        self.sound = torch.ones(self.scenes, dtype=torch.bool, device=device)
        self.by_expert = torch.from_numpy(self.rng.random(self.scenes) < self.settings.expert).to(device)
        for step in range(HISTORY - 1):
            self._look(pictures=step >= HISTORY - FRAMES)
            self.states.append(advance(self.scene, self.states[-1])[0])
        self._left = self.settings.steps - HISTORY

    def _look(self, pictures: bool = True) -> None:
        state = self.states[-1]
        self.sights.append(sight(self.scene, state))
        if pictures:
            self.views.append(self.photographer.views(self.scene, state))

    def _plan_and_drive(self) -> None:
        """Plan, keep some of the moments, and drive until the next plan."""
        self._look()
        images, classes, distance = (torch.stack(one, dim=2) for one in zip(*self.views, strict=True))
        pictures = Pictures(images, classes.flatten(1), distance.flatten(1))
        history = tuple(self.states)
        xyz, rot = relative_poses(history, history[-1])
        # Layers that were compiled for training would be compiled again for every new length.
        with torch.compiler.set_stance("force_eager"):
            plan = self.policy.plan(images, xyz, rot, navigation(self.scene, history[-1]))
        self._keep(decide(self.scene, history[-1]), history, pictures)
        for step in range(self.settings.replan):
            if step:
                self._look()
            self._advance(plan.actions[:, 0, step].double())
        self._left -= self.settings.replan

    def _advance(self, planned: Tensor) -> None:
        before = self.states[-1]
        change = torch.from_numpy(self.rng.random(self.scenes) < DT_S / self.settings.turn_s).to(self.sound.device)
        drawn = torch.from_numpy(self.rng.random(self.scenes) < self.settings.expert).to(self.sound.device)
        self.by_expert = torch.where(change, drawn, self.by_expert)
        expert = decide(self.scene, before)
        own = torch.stack((expert.accel, expert.curvature), dim=1)
        action = torch.where((self.by_expert | ~planned.isfinite().all(dim=1))[:, None], own, planned)
        after, _ = advance(self.scene, before, action)
        self.sound = self.sound & ~faults(self.scene, before, after).any
        self.states.append(after)

    def _keep(self, decision: Decision, history: tuple[State, ...], pictures: Pictures) -> None:
        """Keep moments of sound scenes, rare kinds more often than they occur."""
        kind = decision.cause * len(Manoeuvre) + decision.manoeuvre
        self._counts = 0.98 * self._counts + torch.bincount(kind[self.sound], minlength=len(self._counts))
        weight = self._counts.clamp(min=1.0)[kind] ** -self.settings.balance * self.sound
        draws = torch.from_numpy(self.rng.exponential(size=self.scenes)).to(weight.device)
        rows = (draws / weight.clamp(min=1e-9)).argsort()[: self._kept]
        rows = rows[self.sound[rows]]
        self._parts.append(
            _Moments(
                select(self.scene, rows),
                tuple(select(state, rows) for state in history),
                Sight(*(t[rows] for t in recent(self.sights))),
                Pictures(*(t[rows] for t in pictures)),
            )
        )

    def _labelled(self) -> tuple[Windows, Pictures]:
        parts, self._parts = self._parts, []
        scene = join(*(part.scene for part in parts))
        history = [join(*states) for states in zip(*(part.history for part in parts), strict=True)]
        seen = Sight(*(torch.cat(column) for column in zip(*(part.seen for part in parts), strict=True)))
        pictures = Pictures(*(torch.cat(column) for column in zip(*(part.pictures for part in parts), strict=True)))
        windows, sound = label(scene, history, seen)
        rows = sound.nonzero()[:, 0]
        return windows.rows(rows), Pictures(*(t[rows] for t in pictures))
