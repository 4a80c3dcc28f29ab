"""Closed-loop runs over many scenes: one row of scores per scene."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.closed_loop import ClosedLoop
from flashdrive_node.evaluation.devices import Progress
from flashdrive_node.evaluation.filming import Filming
from flashdrive_node.evaluation.policies import Plans, Policy, make_policy
from flashdrive_node.evaluation.scores import Scores
from flashdrive_node.model.errors import InputError
from flashdrive_node.world.decision_text import parse
from flashdrive_node.world.draws import SPLITS, scene_keys
from flashdrive_node.world.frames import FrameSettings
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, Scenario, Scene, move

#: Called after every step with the loop (its scene's rows are those of the batch) and the newest plans.
OnStep = Callable[[ClosedLoop, Plans | None], object]


@dataclass(frozen=True)
class RunSettings:
    """Which scenes are driven, and how."""

    split: str = "test"
    seconds: float = 20.0
    #: Steps of 0.1 s from plan to plan; in between the last one is followed.
    replan: int = 1
    #: Scenes in lock-step, and those that the model gets at once.
    batch: int = 512
    policy_batch: int = 256

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"split: one of {', '.join(SPLITS)} is required, found {self.split!r}")
        if self.seconds < DT_S or not 1 <= self.replan <= 10 or min(self.batch, self.policy_batch) < 1:
            raise InputError(
                f"at least {DT_S} s, 1 to 10 steps between plans and 1 scene in a batch are required, "
                f"found {self.seconds} s, {self.replan} and {self.batch}"
            )

    @property
    def steps(self) -> int:
        """Of `DT_S`."""
        return round(self.seconds / DT_S)


@dataclass
class SceneRow:
    """How one scene was driven."""

    index: int
    scenario: str
    #: Of `Scores`, as numbers.
    scores: dict[str, float]
    progress: float
    scene_score: float
    #: Share of the steps in which a trajectory was followed.
    following: float
    #: Texts, and how many of them the wording could not have made (empty ones too).
    texts: int = 0
    malformed: int = 0

    def figure(self, name: str) -> float:
        """One figure by name: of the scores, or a field of the row."""
        return float(self.scores[name] if name in self.scores else getattr(self, name))


@dataclass(frozen=True)
class ClosedLoopWork:
    """Driving scenes by policies that are made where they drive, for `devices.spread`."""

    policies: tuple[str, ...]
    model: PlainSettings
    run: RunSettings
    #: Width and height of the pictures.
    size: tuple[int, int] = (288, 160)
    #: Indices of scenes that become videos, and where to: a folder per policy.
    filmed: tuple[int, ...] = ()
    folder: Path = Path()

    def total(self, indices: Sequence[int]) -> int:
        """Steps of all policies and batches."""
        return len(self.policies) * self.run.steps * math.ceil(len(indices) / self.run.batch)

    def __call__(self, indices: Sequence[int], device: str, progress: Progress) -> list[tuple[str, SceneRow]]:
        """Name of the policy and a row, for every policy and scene."""
        model = replace(self.model, device=device)
        policies = {name: make_policy(name, model, self.run.policy_batch) for name in self.policies}
        frames = frames_for(device, self.size, min(len(indices), self.run.batch))
        rows: list[tuple[str, SceneRow]] = []
        for first in range(0, len(indices), self.run.batch):
            part = list(indices[first : first + self.run.batch])
            scene = move(sample_scenes(scene_keys(self.run.split, part)), device)
            expert = expert_scores(scene, self.run.steps)
            for name, policy in policies.items():
                film = Filming(scene, [i for i, index in enumerate(part) if index in self.filmed], name)

                def on_step(loop: ClosedLoop, plans: Plans | None, film: Filming = film) -> None:
                    film.add(loop, plans)
                    progress(1)

                rows += [(name, row) for row in drive_batch(policy, part, scene, expert, self.run, frames, on_step)]
                film.write(self.folder / name, [part[row] for row in film.rows])
        return rows


def frames_for(device: str, size: tuple[int, int], scenes: int) -> FrameSettings:
    """How pictures of so many scenes in lock-step are made; `size` is width and height.

    Compiled chunks are filled up, so they are not made much larger than the scenes are many; steps of 16 keep the sizes
    few that are compiled for.
    """
    settings = FrameSettings.for_device(device, *size)
    return replace(settings, chunk=min(settings.chunk, -(-scenes // 16) * 16))


def drive_batch(
    policy: Policy | None,
    indices: Sequence[int],
    scene: Scene,
    expert: Scores,
    settings: RunSettings,
    frames: FrameSettings,
    on_step: OnStep | None = None,
) -> list[SceneRow]:
    """Drive scenes in lock-step.

    Args:
        policy: Who plans; None lets the expert itself drive.
        indices: Of the scenes in their split.
        scene: The scenes, on the device that computes.
        expert: Of `expert_scores` on them.
        settings: How.
        frames: How pictures are made, for policies that see.
        on_step: Called after every step, for progress and videos.
    """
    loop = ClosedLoop(scene, frames if policy is not None and policy.sees else None)
    if policy is not None:
        policy.begin()
    following = torch.zeros(len(scene), dtype=torch.int64, device=scene.device)
    texts, malformed = [0] * len(scene), [0] * len(scene)
    plans: Plans | None = None
    for step in range(settings.steps):
        if policy is None:
            loop.apply(None)
            following += 1
        else:
            if step % settings.replan == 0:
                plans = policy.plan(loop.observe())
                loop.publish(*plans.driven())
                for row, text in enumerate(plans.texts or ()):
                    texts[row] += 1
                    malformed[row] += parse(text) is None
            following += loop.step().following
        if on_step is not None:
            on_step(loop, plans)
    share = (following.double() / settings.steps).tolist()
    return scene_rows(indices, loop, expert, share, texts, malformed)


def scene_rows(
    indices: Sequence[int],
    loop: ClosedLoop,
    expert: Scores,
    following: Sequence[float],
    texts: Sequence[int],
    malformed: Sequence[int],
) -> list[SceneRow]:
    """One row per scene of a loop that has been driven to its end.

    Args:
        indices: Of the scenes in their split.
        loop: The drives.
        expert: Of `expert_scores` on the same scenes.
        following, texts, malformed: As in `SceneRow`, one per scene.
    """
    scores = loop.tally.scores()
    columns = {name: value.double().tolist() for name, value in scores._asdict().items()}
    progress, scene_score = scores.progress(expert).tolist(), scores.scene_score(expert).tolist()
    return [
        SceneRow(
            index=index,
            scenario=Scenario(int(loop.scene.scenario[row])).name,
            scores={name: values[row] for name, values in columns.items()},
            progress=progress[row],
            scene_score=scene_score[row],
            following=following[row],
            texts=texts[row],
            malformed=malformed[row],
        )
        for row, index in enumerate(indices)
    ]


def expert_scores(scene: Scene, steps: int) -> Scores:
    """How the expert itself drives the same scenes from the same moment on."""
    loop = ClosedLoop(scene)
    for _ in range(steps):
        loop.apply(None)
    return loop.tally.scores()
