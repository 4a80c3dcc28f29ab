"""Drives to learn from: the expert, pushed off its line now and then, and windows chosen from what happens.

Disturbances (DART, arXiv 1703.09327) act on the actions, so pictures, ego history and state agree, and are as far from
the expert's line as those of a learner's own drive; the label of every window is what the expert does from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.training.windows import Windows, decision_of, geometry
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import FUTURE, HISTORY, relative_poses
from flashdrive_node.world.expert import Decision
from flashdrive_node.world.faults import faults
from flashdrive_node.world.frames import FRAMES
from flashdrive_node.world.reasoning import ONSET_STEPS, Reason, reason
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, Scene, select
from flashdrive_node.world.sight import EVIDENCE_STEPS, Sight, sight
from flashdrive_node.world.simulation import advance
from flashdrive_node.world.state import State, first_state
from flashdrive_node.world.wording import navigation, sentences

#: Steps between two looks at what can be seen.
_SIGHT_STEPS = 4


@dataclass(frozen=True)
class Disturbance:
    """Bursts of an Ornstein-Uhlenbeck process on acceleration and turn rate."""

    #: Share of the scenes that are disturbed at all.
    share: float = 0.65
    #: Standard deviations: m/s^2, and rad/s of heading.
    accel: float = 1.6
    turn_rate: float = 0.2
    #: Time constant of the process, and mean duration of bursts and of the calm between them, seconds.
    relax_s: float = 0.8
    burst_s: float = 1.6
    calm_s: float = 2.4


@dataclass(frozen=True)
class DriveJob:
    """One batch of drives; windows are a function of this alone."""

    split: str
    #: Index of the first scene, and number of scenes.
    first: int
    scenes: int
    #: Windows that are chosen at most; fewer where the expert's way on would end in a fault.
    windows: int
    seed: int
    #: Length of a drive.
    steps: int = 200
    disturbance: Disturbance = Disturbance()
    #: A class of windows is chosen in proportion to its count to the power of one less this.
    balance: float = 0.7


class Drive(NamedTuple):
    """T steps of S scenes, stacked: fields [T, S, ...]."""

    scene: Scene
    #: T + 1 moments.
    states: State
    decisions: Decision
    #: What has been seen in the last 2 s.
    seen: Sight
    #: Nothing went wrong so far: bool [T, S].
    sound: Tensor


def windows_of(job: DriveJob) -> Windows:
    """Drive, choose and label: the windows of a job, on the CPU."""
    rng = np.random.default_rng((job.seed, job.first))
    keys = scene_keys(job.split, np.arange(job.first, job.first + job.scenes))
    drive = disturbed_drive(sample_scenes(keys), job.steps, job.disturbance, rng)
    step, scene = choose(drive, job.windows, job.balance, rng)
    windows, sound = label(
        select(drive.scene, scene),
        history_states(drive.states, step, scene),
        Sight(*(t[step, scene] for t in drive.seen)),
    )
    return windows.rows(sound.nonzero()[:, 0])


def disturbance_of(scenes: int, steps: int, settings: Disturbance, rng: np.random.Generator) -> Tensor:
    """Standard disturbances of acceleration and turn rate in bursts: float64 [steps, S, 2], zero in between."""
    keep = np.exp(-DT_S / settings.relax_s)
    noise = rng.standard_normal((steps, scenes, 2))
    switch = rng.random((steps, scenes))
    disturbed = rng.random(scenes) < settings.share
    value, on = np.zeros((scenes, 2)), np.zeros(scenes, bool)
    out = np.zeros((steps, scenes, 2))
    for step in range(steps):
        value = keep * value + np.sqrt(1 - keep * keep) * noise[step]
        on = np.where(on, switch[step] > DT_S / settings.burst_s, switch[step] < DT_S / settings.calm_s)
        out[step] = value * (on & disturbed)[:, None]
    return torch.from_numpy(out * (settings.accel, settings.turn_rate))


def disturbed_drive(scene: Scene, steps: int, settings: Disturbance, rng: np.random.Generator) -> Drive:
    """Let the expert drive under disturbances."""
    push = disturbance_of(len(scene), steps, settings, rng).to(scene.device)
    states, decisions, sound = [first_state(scene)], [], []
    sights: list[Sight] = []
    fine = torch.ones(len(scene), dtype=torch.bool, device=scene.device)
    for step in range(steps):
        before = states[-1]
        # What is seen hardly changes from step to step, and is half of the work.
        sights.append(sight(scene, before) if step % _SIGHT_STEPS == 0 else sights[-1])
        sound.append(fine)
        # Who stands is not pushed over the line; and a turn rate is a curvature times a speed.
        by = torch.stack(
            (push[step, :, 0] * (before.speed / 3.0).clamp(max=1.0), push[step, :, 1] / before.speed.clamp(min=3.0)),
            dim=1,
        )
        state, decision = advance(scene, before, disturbance=by)
        fine = fine & ~faults(scene, before, state).any
        states.append(state)
        decisions.append(decision)
    stacked = State(**{f.name: torch.stack([getattr(s, f.name) for s in states]) for f in fields(State)})
    seen = Sight(*(_recently(torch.stack(one)) for one in zip(*sights, strict=True)))
    return Drive(scene, stacked, stack_decisions(decisions), seen, torch.stack(sound))


def stack_decisions(decisions: Sequence[Decision]) -> Decision:
    """One decision per step as one of fields [T, S]."""
    return Decision(*(torch.stack(one) for one in zip(*decisions, strict=True)))


def _recently(seen: Tensor) -> Tensor:
    """Whether something was true in the last `EVIDENCE_STEPS`: bool [T, ...] -> bool [T, ...]."""
    count = seen.int().cumsum(dim=0)
    count[EVIDENCE_STEPS:] -= count[:-EVIDENCE_STEPS].clone()
    return count > 0


def choose(drive: Drive, count: int, balance: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Steps and scenes of up to `count` windows, int64 each, rare decisions more often than they occur."""
    steps = drive.decisions.cause.shape[0]
    sound = drive.sound.clone()
    sound[: HISTORY - 1] = False
    sound[steps - ONSET_STEPS :] = False
    step, scene = sound.nonzero(as_tuple=True)
    pool = torch.from_numpy(rng.permutation(len(step))[: 24 * count])
    step, scene = step[pool], scene[pool]
    classes = decision_of(
        reason(
            select(drive.scene, scene),
            at(drive.states, step, scene),
            [Sight(*(t[step, scene] for t in drive.seen))],
            Decision(*(t[step, scene] for t in drive.decisions)),
            Decision(*(t[step + ONSET_STEPS, scene] for t in drive.decisions)),
        )
    )
    _, member, counts = classes.unique(dim=0, return_inverse=True, return_counts=True)
    weight = (counts.double() ** -balance)[member].numpy()
    # Without replacement: the smallest of exponential variates over the weights.
    picked = torch.from_numpy(np.argsort(rng.exponential(size=len(weight)) / weight)[:count])
    return step[picked], scene[picked]


def at(states: State, step: Tensor, scene: Tensor) -> State:
    """Moments of stacked states at (step, scene), int64 [N] each."""
    return State(**{f.name: getattr(states, f.name)[step, scene] for f in fields(State)})


def history_states(states: State, step: Tensor, scene: Tensor) -> list[State]:
    """The `HISTORY` moments up to a step, oldest first."""
    return [at(states, step - back, scene) for back in range(HISTORY - 1, -1, -1)]


def label(scene: Scene, history: Sequence[State], seen: Sight) -> tuple[Windows, Tensor]:
    """Windows with the expert's way on, and where that way has no fault: bool [N].

    Args:
        scene: N scenes.
        history: The `HISTORY` moments of each up to t0.
        seen: What has been seen in the last 2 s.
    """
    start = state = history[-1]
    actions, decisions = [], []
    sound = torch.ones(len(scene), dtype=torch.bool, device=scene.device)
    for _ in range(FUTURE):
        before = state
        state, decision = advance(scene, before)
        sound = sound & ~faults(scene, before, state).any
        actions.append(torch.stack((decision.accel, decision.curvature), dim=1))
        decisions.append(decision)
    why = reason(scene, start, [seen], decisions[0], decisions[ONSET_STEPS])
    xyz, rot = relative_poses(history, start)
    values, known = geometry(scene, start)
    windows = Windows(
        scene=scene,
        frames=tuple(history[-FRAMES:]),
        history_xyz=xyz,
        history_rot=rot,
        actions=torch.stack(actions, dim=1).float(),
        decision=decision_of(why),
        geometry=values,
        geometry_known=known,
        sentences=tuple(sentences(scene, start, Reason(*(t.cpu() for t in why)))),
        navigation=tuple(navigation(scene, start)),
    )
    return windows, sound
