"""A video of one closed-loop drive: the cameras with the planned path in them, the world from above, the reasoning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from flashdrive_node.evaluation.drive_picture import PLAN, Moment, View, draw_moment
from flashdrive_node.evaluation.mp4 import write_mp4
from flashdrive_node.evaluation.plan_view import plan_view
from flashdrive_node.evaluation.world_views import camera_model
from flashdrive_node.world.camera import CAMERAS
from flashdrive_node.world.scene import DT_S, Scene, move
from flashdrive_node.world.state import State
from flashdrive_node.world.tracking import Trajectory
from flashdrive_node.world.wording import navigation

#: Every so many steps of the world there is a picture.
_STRIDE = 2
#: Reading order: front wide, front telephoto, left, right.
_ORDER = (1, 6, 0, 2)


@dataclass(frozen=True, eq=False)
class _Shot:
    state: State
    trajectory: Trajectory
    pictures: Mapping[int, NDArray[np.uint8]]
    said: str
    figures: Sequence[tuple[str, str]]


class DriveVideo:
    """Collects the moments of one drive, and draws them when it is over: a drive in real time must not wait.

    Args:
        scene: One scene, on any device.
        note: What a viewer must know, in every picture.
        planner: Whose the planned paths are.
    """

    def __init__(self, scene: Scene, note: str = "", planner: str = "the model"):
        self._scene = move(scene, "cpu")
        self._note, self._planner = note, planner
        self._shots: list[_Shot] = []
        self._steps = 0

    def add(
        self,
        state: State,
        trajectory: Trajectory,
        pictures: Mapping[int, NDArray[np.uint8]],
        said: str,
        figures: Sequence[tuple[str, str]] = (),
    ) -> None:
        """One step of the drive.

        Args:
            state: Where everybody was.
            trajectory: What was followed from there on.
            pictures: Of every camera by index, RGB uint8 [H, W, 3].
            said: The reasoning.
            figures: Names and values to show beside the speed.
        """
        if self._steps % _STRIDE == 0:
            self._shots.append(_Shot(move(state, "cpu"), move(trajectory, "cpu"), dict(pictures), said, figures))
        self._steps += 1

    def write(self, path: Path, quiet: bool = False) -> int:
        """Draw everything into an MP4; returns the number of pictures.

        Raises:
            OSError: No video can be written there, or nothing was added.
        """
        shots = tqdm(self._shots, desc=path.name, unit="picture", disable=quiet)
        return write_mp4(path, 1.0 / (DT_S * _STRIDE), self._draw(shots))

    def _draw(self, shots: Iterable[_Shot]) -> Iterator[NDArray[np.uint8]]:
        for shot in shots:
            state, first = shot.state, float(self._shots[0].state.time_s)
            yield draw_moment(
                Moment(
                    time_s=float(state.time_s) - first,
                    views=list(_views(shot.pictures)),
                    planned=_planned(shot),
                    driven=None,
                    said=shot.said,
                    navigation=navigation(self._scene, state)[0] or "",
                    figures=[("speed", f"{float(state.speed):.1f} m/s"), *shot.figures],
                    ground=plan_view(self._scene, state, PLAN),
                    duration_s=float(self._shots[-1].state.time_s) - first,
                    note=self._note,
                    planner=self._planner,
                )
            )


def _views(pictures: Mapping[int, NDArray[np.uint8]]) -> Iterator[View]:
    known = {camera.index: camera for camera in CAMERAS}
    for index in _ORDER:
        if index in pictures:
            picture = pictures[index]
            yield View(known[index].name, picture, camera_model(known[index], picture.shape[1], picture.shape[0]))


def _planned(shot: _Shot) -> NDArray[np.float64]:
    """The part of the trajectory that lies ahead [N, 3] in the vehicle frame; nothing where there is none."""
    t, state = shot.trajectory, shot.state
    if not bool(t.exists):
        return np.zeros((0, 3))
    ahead = t.time_s[0] >= state.time_s[0]
    dx, dy = t.x[0, ahead] - state.x, t.y[0, ahead] - state.y
    c, s = state.yaw.cos(), state.yaw.sin()
    return torch.stack((c * dx + s * dy, c * dy - s * dx, torch.zeros_like(dx)), dim=1).numpy()
