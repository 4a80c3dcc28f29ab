"""A drive by the expert with everything that a learner or a score needs, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.model.action_space import yaw_matrix
from flashdrive_node.world.expert import Decision
from flashdrive_node.world.faults import Faults, faults, no_faults
from flashdrive_node.world.reasoning import ONSET_STEPS, Reason, reason
from flashdrive_node.world.scene import Scene
from flashdrive_node.world.sight import Sight, sight
from flashdrive_node.world.simulation import Rollout, advance, rollout
from flashdrive_node.world.state import State, first_state, perturb
from flashdrive_node.world.wording import navigation, sentences

#: Poses of a history (the last at t0) and waypoints of a future.
HISTORY, FUTURE = 16, 64


@dataclass(frozen=True)
class Episode:
    """T steps of S scenes: T + 1 states, and T decisions, sights and what went wrong on the way."""

    scene: Scene
    states: list[State]
    decisions: list[Decision]
    sights: list[Sight]
    faults: Faults

    @property
    def windows(self) -> range:
        """Steps that have a full history, a full future and a reason."""
        return range(HISTORY - 1, len(self.decisions) - max(FUTURE, ONSET_STEPS) + 1)

    def history(self, step: int) -> tuple[Tensor, Tensor]:
        """Ego positions [S, 16, 3] and rotations [S, 16, 3, 3] up to a step, float32, in the vehicle frame there."""
        return relative_poses(self.states[step - HISTORY + 1 : step + 1], self.states[step])

    def future(self, step: int) -> tuple[Tensor, Tensor]:
        """Ego positions [S, 64, 3] and rotations [S, 64, 3, 3] from 0.1 s on, in the vehicle frame of the step."""
        return relative_poses(self.states[step + 1 : step + FUTURE + 1], self.states[step])

    def actions(self, step: int) -> Tensor:
        """Acceleration and curvature that were driven from a step on: [S, 64, 2], m/s^2 and 1/m, float64."""
        driven = self.decisions[step : step + FUTURE]
        return torch.stack([torch.stack((d.accel, d.curvature), dim=1) for d in driven], dim=1)

    def reason(self, step: int) -> Reason:
        """Why the ego does at a step what it does next."""
        onset = self.decisions[min(step + ONSET_STEPS, len(self.decisions) - 1)]
        return reason(self.scene, self.states[step], self.sights[: step + 1], self.decisions[step], onset)

    def sentences(self, step: int) -> list[str]:
        """The reason in words, one sentence per scene."""
        return sentences(self.scene, self.states[step], self.reason(step))

    def navigation(self, step: int) -> list[str | None]:
        """The navigation instruction at a step, per scene."""
        return navigation(self.scene, self.states[step])

    def recovery(self, step: int, lateral_m: Tensor, heading: Tensor, speed_factor: Tensor) -> tuple[State, Rollout]:
        """What the expert does when the ego is displaced at a step: the state to render, and 6.4 s of label.

        The history of the displaced ego is `history(step)`, which moves with it.

        Args:
            step: Of this episode.
            lateral_m: To the left [S], metres.
            heading: To the left [S], radians.
            speed_factor: [S].
        """
        state = perturb(self.scene, self.states[step], lateral_m, heading, speed_factor)
        return state, rollout(self.scene, state, FUTURE)


def record(scene: Scene, steps: int) -> Episode:
    """Let the expert drive, and keep everything.

    Args:
        scene: S scenes, on any device.
        steps: Of DT_S.
    """
    states, decisions, sights, wrong = [first_state(scene)], [], [], no_faults(scene)
    for _ in range(steps):
        sights.append(sight(scene, states[-1]))
        state, decision = advance(scene, states[-1])
        happened = faults(scene, states[-1], state)
        wrong = Faults(*(a | b for a, b in zip(wrong, happened, strict=True)))
        states.append(state)
        decisions.append(decision)
    return Episode(scene, states, decisions, sights, wrong)


def relative_poses(states: Sequence[State], frame: State) -> tuple[Tensor, Tensor]:
    """Ego positions [S, T, 3], metres, and rotations [S, T, 3, 3] of T moments in the vehicle frame of one, float32."""
    x = torch.stack([s.x for s in states], dim=1) - frame.x[:, None]
    y = torch.stack([s.y for s in states], dim=1) - frame.y[:, None]
    c, s = frame.yaw.cos()[:, None], frame.yaw.sin()[:, None]
    yaw = torch.stack([s.yaw for s in states], dim=1) - frame.yaw[:, None]
    xyz = torch.stack((c * x + s * y, c * y - s * x, torch.zeros_like(x)), dim=2)
    return xyz.float(), yaw_matrix(yaw).float()
