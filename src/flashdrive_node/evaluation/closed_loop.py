"""Scenes driven in lock-step by somebody's plans: observe, plan, follow, step after step.

The expert drives until there is a history; from then on the vehicles follow the trajectories that they are given.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.evaluation.scores import Tally
from flashdrive_node.world.episode import FUTURE, HISTORY, relative_poses
from flashdrive_node.world.frames import FRAMES, FrameSettings, render_frames
from flashdrive_node.world.scene import DT_S, Scene
from flashdrive_node.world.simulation import advance
from flashdrive_node.world.state import State, first_state
from flashdrive_node.world.tracking import Command, Trajectory, from_vehicle, newest, no_trajectory, track
from flashdrive_node.world.wording import navigation


class Observation(NamedTuple):
    """What a policy gets to know about S vehicles at one moment."""

    #: Oldest frame first, uint8 [S, cameras, 4, H, W, 3]; None where no pictures are made.
    images: Tensor | None
    #: Up to now, in the vehicle frame, float32 [S, 16, 3], metres, and [S, 16, 3, 3].
    history_xyz: Tensor
    history_rot: Tensor
    #: Navigation instructions.
    navigation: list[str | None]
    #: m/s [S].
    speed: Tensor
    #: When the frames were taken, oldest first, the same in all scenes; empty where nobody tells frames by it.
    stamps_ns: tuple[int, ...] = ()


def stamp_ns(step: int) -> int:
    """Time of a step of the world, nanoseconds."""
    return round(step * DT_S * 1e9)


class ClosedLoop:
    """S scenes, and the vehicle in each of them.

    Attributes:
        scene: The scenes.
        states: The newest states, oldest first.
        trajectory: What is being followed.
        tally: Scores since the expert handed over.
    """

    def __init__(self, scene: Scene, frames: FrameSettings | None = None):
        """Let the expert drive until there is a history of 16 poses.

        Args:
            scene: S scenes, on the device that computes.
            frames: How pictures are made; None makes none.
        """
        self.scene, self.frames = scene, frames
        self.states: deque[State] = deque([first_state(scene)], maxlen=HISTORY)
        for _ in range(HISTORY - 1):
            self.states.append(advance(scene, self.states[-1])[0])
        self._step = HISTORY - 1
        self.trajectory: Trajectory = no_trajectory(self.state, FUTURE)
        self.tally = Tally(scene, self.state)
        self._pictures: list[tuple[State, Tensor]] = []

    @property
    def state(self) -> State:
        """Where everybody is now."""
        return self.states[-1]

    def observe(self) -> Observation:
        """What the sensors say now. Pictures that were made for an earlier moment are not made again."""
        xyz, rot = relative_poses(list(self.states), self.state)
        stamps = tuple(stamp_ns(step) for step in range(self._step - FRAMES + 1, self._step + 1))
        told = navigation(self.scene, self.state)
        return Observation(self._images(), xyz, rot, told, self.state.speed, stamps)

    def _images(self) -> Tensor | None:
        if self.frames is None:
            return None
        shown = []
        for state in list(self.states)[-FRAMES:]:
            pictures = self.pictures_at(state)
            shown.append(render_frames(self.scene, state, self.frames) if pictures is None else pictures)
        self._pictures = list(zip(list(self.states)[-FRAMES:], shown, strict=True))
        return torch.stack(shown, dim=2)

    def pictures_at(self, state: State) -> Tensor | None:
        """Pictures that were made of one of the newest moments, uint8 [S, cameras, H, W, 3], or None."""
        return next((pictures for known, pictures in self._pictures if known is state), None)

    def publish(self, xyz: Tensor, yaw: Tensor, speed: Tensor) -> None:
        """Follow a plan that was made for this moment; rows that are not finite keep the plan before.

        Args:
            xyz: In the vehicle frame, at 0.1 s, 0.2 s, ... [S, 64, 2 or 3], metres.
            yaw: [S, 64], radians.
            speed: [S, 64], m/s.
        """
        after_s = DT_S * torch.arange(1, yaw.shape[1] + 1, dtype=torch.float64, device=yaw.device)
        self.trajectory = newest(self.trajectory, from_vehicle(self.state, after_s, xyz[..., :2], yaw, speed))

    def step(self) -> Command:
        """Follow the trajectory for one step of 0.1 s."""
        command = track(self.trajectory, self.state)
        self.apply(command.action)
        return command

    def apply(self, action: Tensor | None) -> None:
        """Drive one step by an action (acceleration and curvature [S, 2]), or by the expert's."""
        before = self.state
        after, _ = advance(self.scene, before, action)
        self.tally.add(before, after)
        self.states.append(after)
        self._step += 1
