"""Clips of the procedural world: what the cameras see while the expert drives, and what it drove as truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.evaluation.clip import PROTOCOL_START_S, PROTOCOL_WINDOWS, Clip, Truth, Window
from flashdrive_node.evaluation.closed_loop import stamp_ns
from flashdrive_node.model.errors import InputError
from flashdrive_node.world.camera import CAMERAS
from flashdrive_node.world.draws import SPLITS, scene_keys
from flashdrive_node.world.episode import FUTURE, Episode, record
from flashdrive_node.world.render import render
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, move, select
from flashdrive_node.world.state import State

#: Scenes that are simulated together, frames that are rendered together on a CPU, and frames of a window.
_SCENES, _CPU_FRAMES, _FRAMES = 32, 8, 4
_FIRST = round(PROTOCOL_START_S / DT_S)
#: What the cameras see at one step, by their indices: uint8 [height, width, 3].
_Images = dict[int, NDArray[np.uint8]]


class WorldClips:
    """One clip per scene; scenes in which the expert itself is at fault are left out."""

    def __init__(
        self,
        split: str,
        indices: range,
        windows: int = PROTOCOL_WINDOWS,
        size: tuple[int, int] = (160, 288),
        device: torch.device | str = "cpu",
        compiled: bool | None = None,
    ):
        """Keep what is needed to drive.

        Args:
            split: One of `world.draws.SPLITS`.
            indices: Of the scenes.
            windows: Of a clip.
            size: Height and width of the pictures, pixels.
            device: Where to render.
            compiled: See `world.render.render`; by default on GPUs, where it is many times as fast.

        Raises:
            InputError: Unknown split, clips without windows, or a size that cannot be rendered.
        """
        if split not in SPLITS or windows < 1 or size[0] < 8 or size[1] < 8 or size[1] % 8:
            raise InputError(
                f"a split of {', '.join(SPLITS)}, 1 window or more and a size of 8 pixels or more with a width that is "
                f"a multiple of 8 are required, found {split!r}, {windows} and {size[0]} x {size[1]}"
            )
        self.name = f"world {split}:{indices.start}-{indices.stop - 1}"
        self.camera_indices = tuple(camera.index for camera in CAMERAS)
        self.split, self.indices, self.windows = split, indices, windows
        self.size, self.device = size, torch.device(device)
        self.compiled = self.device.type == "cuda" if compiled is None else compiled

    def __len__(self) -> int:
        return len(self.indices)

    def clips(self) -> Iterator[Clip]:
        """A clip per scene, in order of the indices."""
        steps = _FIRST + self.windows - 1 + FUTURE
        for start in range(0, len(self.indices), _SCENES):
            indices = self.indices[start : start + _SCENES]
            drives = _Drives(self.split, list(indices), steps)
            for row, index in enumerate(indices):
                notes: list[str] = []
                windows = partial(self._windows, drives, row, notes)
                yield Clip(f"{self.split}-{index:06d}", windows(), notes, windows)

    def _windows(self, drives: _Drives, row: int, notes: list[str], stride: int = 1) -> Iterator[Window]:
        episode = drives.episode
        if bool(episode.faults.any[row]):
            notes.append("left out: the expert itself is at fault in this scene")
            return
        numbers = range(0, self.windows, stride)
        seen = {_FIRST + number - back for number in numbers for back in range(_FRAMES)}
        pictures = _Pictures(self._pictures(episode, row, sorted(seen)))
        for number in numbers:
            step = _FIRST + number
            steps = range(step - _FRAMES + 1, step + 1)
            frames = pictures.at(steps)
            stamps = tuple(stamp_ns(s) for s in steps)
            cameras = tuple(
                CameraFrames(camera.index, stamps, tuple(images[camera.index] for images in frames))
                for camera in CAMERAS
            )
            told = drives.at(step)
            xyz, rot, future_xyz, future_rot = (t[row].numpy() for t in told.poses)
            yaw = np.unwrap(np.arctan2(future_rot[:, 1, 0], future_rot[:, 0, 0]))
            truth = Truth(future_xyz, yaw.astype(np.float32), told.sentences[row])
            yield Window(Observation(number, stamp_ns(step), cameras, xyz, rot, told.navigation[row]), truth)

    def _pictures(self, episode: Episode, row: int, steps: Sequence[int]) -> Iterator[tuple[int, _Images]]:
        """Steps, and what the cameras see there, in order.

        A GPU makes all of them at once. On a CPU who takes but few of a clip's windows waits for no others.
        """
        scene = move(select(episode.scene, torch.tensor([row])), self.device)
        start, together = 0, len(steps) if self.device.type == "cuda" else _FRAMES
        while start < len(steps):
            run = steps[start : start + together]
            states = [episode.states[s] for s in run]
            start, together = start + together, max(together, _CPU_FRAMES)
            at = move(_over_time(states, row), self.device)
            scenes = select(scene, torch.zeros(len(states), dtype=torch.int64, device=self.device))
            images = {
                camera.index: render(scenes, at, camera, self.size[1], self.size[0], compiled=self.compiled)
                .image.cpu()
                .numpy()
                for camera in CAMERAS
            }
            for place, step in enumerate(run):
                yield step, {index: image[place] for index, image in images.items()}


class _Pictures:
    """Pictures by step, made as they are asked for and kept for as long as one window reaches back."""

    def __init__(self, made: Iterator[tuple[int, _Images]]):
        self._made = made
        self._kept: dict[int, _Images] = {}

    def at(self, steps: range) -> list[_Images]:
        """Those of consecutive steps, none of which comes before those of the last call."""
        self._kept = {step: images for step, images in self._kept.items() if step >= steps.start}
        while steps[-1] not in self._kept:
            step, images = next(self._made)
            self._kept[step] = images
        return [self._kept[step] for step in steps]


class _Told(NamedTuple):
    """What is known of some scenes at a step."""

    #: Positions and rotations of the history and of the future.
    poses: tuple[Tensor, Tensor, Tensor, Tensor]
    sentences: list[str]
    navigation: list[str | None]


class _Drives:
    """Drives of some scenes by the expert, simulated when the first of them is looked at."""

    def __init__(self, split: str, indices: list[int], steps: int):
        self._split, self._indices, self._steps = split, indices, steps
        self._told: dict[int, _Told] = {}

    @cached_property
    def episode(self) -> Episode:
        """All scenes; on the CPU, so that the drives are the same wherever pictures are rendered."""
        return record(sample_scenes(scene_keys(self._split, self._indices)), self._steps)

    def at(self, step: int) -> _Told:
        """Computed once for all scenes."""
        if step not in self._told:
            episode = self.episode
            poses = (*episode.history(step), *episode.future(step))
            self._told[step] = _Told(poses, episode.sentences(step), episode.navigation(step))
        return self._told[step]


def _over_time(states: list[State], row: int) -> State:
    """The states of one scene as a batch of scenes."""
    return State(**{name: torch.stack([getattr(s, name)[row] for s in states]) for name in vars(states[0])})
