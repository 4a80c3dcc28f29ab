"""Windows of the world with what the expert then did and said, as they occur and as often for every decision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.evaluation.closed_loop import Observation
from flashdrive_node.model.errors import InputError
from flashdrive_node.world.decision_text import StatedDecision, parse
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import FUTURE, HISTORY, Episode, record, relative_poses
from flashdrive_node.world.frames import FRAMES, FrameSettings, render_frames
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import Scene, move, select
from flashdrive_node.world.state import State
from flashdrive_node.world.wording import navigation


@dataclass(frozen=True)
class WindowChoice:
    """Which windows are taken from the drives."""

    split: str = "test"
    #: Length of a drive, steps of 0.1 s.
    steps: int = 200
    #: Per scene, at any time: decisions occur as often as they do.
    natural: int = 2
    #: Per decision class and hundred scenes, as far as there are so many.
    balanced: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < HISTORY + FUTURE or min(self.natural, self.balanced) < 0 or self.natural + self.balanced == 0:
            raise InputError(
                f"drives of {HISTORY + FUTURE} steps or more and a positive number of windows are required, "
                f"found {self.steps} steps, {self.natural} and {self.balanced} windows"
            )


@dataclass(frozen=True)
class WorldWindows:
    """N windows, one row each."""

    #: Index of each window's scene in the split, and the step of t0.
    index: list[int]
    step: list[int]
    #: In which samples it is.
    natural: list[bool]
    balanced: list[bool]
    scene: Scene
    #: The 16 moments up to t0, oldest first.
    history: list[State]
    #: What the expert then drove, in the vehicle frame at t0: [N, 64, 2], metres, and headings [N, 64], radians.
    future_xy: Tensor
    future_yaw: Tensor
    #: What it said, and what that means.
    sentences: list[str]
    decisions: list[StatedDecision]

    def __len__(self) -> int:
        return len(self.index)

    def observe(self, rows: Sequence[int], frames: FrameSettings | None) -> Observation:
        """What the sensors said at t0 of some windows; pictures are made if there are settings for them."""
        at = torch.tensor(rows, device=self.scene.device)
        scene = select(self.scene, at)
        history = [select(moment, at) for moment in self.history]
        xyz, rot = relative_poses(history, history[-1])
        images = None
        if frames is not None:
            images = torch.stack([render_frames(scene, moment, frames) for moment in history[-FRAMES:]], dim=2)
        return Observation(images, xyz, rot, navigation(scene, history[-1]), history[-1].speed)


def world_windows(indices: Sequence[int], choice: WindowChoice, device: torch.device | str = "cpu") -> WorldWindows:
    """Let the expert drive scenes and choose windows; scenes in which it is at fault itself are left out.

    Args:
        indices: Of the scenes in the split.
        choice: Which windows.
        device: Where the windows are to be.

    Raises:
        InputError: No scene is left.
    """
    # On the CPU, so that the drives are the same wherever pictures are rendered.
    episode = record(sample_scenes(scene_keys(choice.split, list(indices))), choice.steps)
    decisions = _decisions(episode)
    if not decisions:
        raise InputError(f"scenes that the expert drives without a fault are required, found none in {list(indices)}")
    rng = np.random.default_rng((choice.seed, indices[0]))
    natural = _natural(decisions, choice.natural, rng)
    balanced = _balanced(decisions, round(choice.balanced * len(indices) / 100), rng)
    places = sorted(natural | balanced)
    steps, rows = (torch.tensor(column) for column in zip(*places, strict=True))
    states = State(**{f.name: torch.stack([getattr(s, f.name) for s in episode.states]) for f in fields(State)})

    def moments(first: int, last: int) -> list[State]:
        return [State(**{k: v[steps + i, rows] for k, v in vars(states).items()}) for i in range(first, last)]

    history = moments(1 - HISTORY, 1)
    future_xyz, future_rot = relative_poses(moments(1, FUTURE + 1), history[-1])
    yaw = torch.atan2(future_rot[..., 1, 0], future_rot[..., 0, 0])
    return WorldWindows(
        index=[indices[row] for row in rows.tolist()],
        step=steps.tolist(),
        natural=[place in natural for place in places],
        balanced=[place in balanced for place in places],
        scene=move(select(episode.scene, rows), device),
        history=[move(moment, device) for moment in history],
        future_xy=future_xyz[..., :2].to(device),
        future_yaw=yaw.to(device),
        sentences=[decisions[place][0] for place in places],
        decisions=[decisions[place][1] for place in places],
    )


def _decisions(episode: Episode) -> dict[tuple[int, int], tuple[str, StatedDecision]]:
    """Sentence and decision of every window (step, scene) of scenes without a fault."""
    sound = (~episode.faults.any).tolist()
    found = {}
    for step in episode.windows:
        for row, text in enumerate(episode.sentences(step)):
            decision = parse(text) if sound[row] else None
            if decision is not None:
                found[step, row] = (text, decision)
    return found


def _natural(
    decisions: dict[tuple[int, int], tuple[str, StatedDecision]], count: int, rng: np.random.Generator
) -> set[tuple[int, int]]:
    by_scene: dict[int, list[int]] = defaultdict(list)
    for step, row in decisions:
        by_scene[row].append(step)
    return {
        (int(step), row)
        for row, steps in by_scene.items()
        for step in rng.choice(steps, size=min(count, len(steps)), replace=False)
    }


def _balanced(
    decisions: dict[tuple[int, int], tuple[str, StatedDecision]], count: int, rng: np.random.Generator
) -> set[tuple[int, int]]:
    by_label: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for place, (_, decision) in decisions.items():
        by_label[decision.label].append(place)
    chosen: set[tuple[int, int]] = set()
    for places in by_label.values():
        # Scene by scene in turn, so that few windows of a class come from the same one.
        seen: dict[int, int] = defaultdict(int)
        ranked: list[tuple[int, int, tuple[int, int]]] = []
        for number in rng.permutation(len(places)).tolist():
            place = places[number]
            ranked.append((seen[place[1]], len(ranked), place))
            seen[place[1]] += 1
        chosen |= {place for _, _, place in sorted(ranked)[:count]}
    return chosen
