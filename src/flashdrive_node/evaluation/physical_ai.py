"""Clips of NVIDIA's PhysicalAI-Autonomous-Vehicles dataset, read by its own package ``physical_ai_av``.

The protocol is that of the published figures: t0 from 1.7 s on every 0.1 s, frames closest before t0 - 0.3 s, ..., t0,
16 poses at 10 Hz up to t0, and 64 poses of truth behind it. Times of a clip are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.evaluation.clip import (
    FUTURE_DT_S,
    FUTURE_POINTS,
    PROTOCOL_START_S,
    PROTOCOL_WINDOWS,
    Clip,
    ClipError,
    Truth,
    Window,
)
from flashdrive_node.evaluation.physical_ai_files import open_dataset
from flashdrive_node.model.errors import InputError
from flashdrive_node.runtime.rig import CAMERA_INDICES

#: The model's default cameras.
CAMERAS = tuple(name for name, index in CAMERA_INDICES.items() if index in (0, 1, 2, 6))
_FRAMES, _POSES = 4, 16
#: Windows whose frames are decoded at once: 24 pictures of 1080p per camera are 150 MB.
_TOGETHER = 20
_STEP_US = round(FUTURE_DT_S * 1e6)


class PhysicalAIClips:
    """Clips of a downloaded part of the dataset."""

    def __init__(
        self,
        directory: Path,
        clip_ids: Sequence[str] | None = None,
        windows: int = PROTOCOL_WINDOWS,
        cameras: Sequence[str] = CAMERAS,
    ):
        """Open the dataset.

        Args:
            directory: Its files as in the repository, or a Hugging Face cache that holds them.
            clip_ids: Clips to read; by default all whose files are there.
            windows: Of a clip at most.
            cameras: Features of the dataset.

        Raises:
            InputError: No dataset there, or clips or cameras that it has not.
        """
        if windows < 1:
            raise InputError(f"clips of 1 window or more are required, found {windows}")
        self.dataset = open_dataset(directory)
        self.cameras = sorted(cameras, key=lambda name: CAMERA_INDICES[name])
        self.camera_indices = tuple(CAMERA_INDICES[name] for name in self.cameras)
        needed = [*self.cameras, "egomotion"]
        known = self.dataset.clip_ids()
        if unknown := sorted(set(clip_ids or ()) - set(known)):
            raise InputError(f"{directory}: clips of the index are required, found {', '.join(unknown[:5])}")
        chosen = list(known if clip_ids is None else clip_ids)
        self.clip_ids = chosen if clip_ids is not None else [c for c in chosen if self.dataset.has(c, needed)]
        if not self.clip_ids:
            raise InputError(f"{directory}: clips with {', '.join(needed)} are required, found none")
        self.windows = windows
        self.name = f"PhysicalAI {len(self.clip_ids)} clips"

    def __len__(self) -> int:
        return len(self.clip_ids)

    def clips(self) -> Iterator[Clip]:
        """A clip per id, in the order given or of the index."""
        for clip_id in self.clip_ids:
            yield Clip(clip_id, self._windows(clip_id))

    def _windows(self, clip_id: str) -> Iterator[Window]:
        try:
            motion = self.dataset.read(clip_id, "egomotion")
            videos = {name: self.dataset.read(clip_id, name) for name in self.cameras}
            start_us = round(PROTOCOL_START_S * 1e6)
            for first in range(0, self.windows, _TOGETHER):
                count = min(_TOGETHER, self.windows - first)
                t0s_us = start_us + _STEP_US * np.arange(first, first + count)
                frames = {name: _frames(video, t0s_us, name) for name, video in videos.items()}
                for number, t0_us in enumerate(t0s_us.tolist()):
                    cameras = tuple(
                        CameraFrames(
                            CAMERA_INDICES[name],
                            tuple(int(t) * 1000 for t in stamps[number : number + _FRAMES]),
                            tuple(images[number : number + _FRAMES]),
                        )
                        for name, (images, stamps) in frames.items()
                    )
                    xyz, rot = history(motion, t0_us)
                    observation = Observation(first + number, t0_us * 1000, cameras, xyz, rot)
                    yield Window(observation, future(motion, t0_us))
        except (ValueError, KeyError, OSError) as error:
            raise ClipError(f"{clip_id}: {type(error).__name__}: {error}") from error


def _frames(video: Any, t0s_us: NDArray[np.int64], name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [windows + 3, height, width, 3] and stamps of consecutive windows, which share all but one of them."""
    wanted = np.concatenate((t0s_us[0] - _STEP_US * np.arange(_FRAMES - 1, 0, -1), t0s_us))
    images, stamps = video.decode_images_from_timestamps(wanted)
    late_us = wanted - stamps
    if (np.diff(stamps) <= 0).any() or late_us.max() >= _STEP_US:
        worst = int(late_us.argmax())
        raise ValueError(
            f"{name}: a frame within {_STEP_US / 1000:g} ms before each of the times is required, at "
            f"{wanted[worst] / 1e6:.3f} s the last is {late_us[worst] / 1000:g} ms old"
        )
    return images, stamps


def history(motion: Any, t0_us: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Ego positions [16, 3], metres, and rotations [16, 3, 3] up to t0, in the vehicle frame at t0."""
    pose = motion(t0_us - _STEP_US * np.arange(_POSES - 1, -1, -1)).pose
    xyz, rot = _seen_from(pose, -1)
    return xyz.astype(np.float32), rot.astype(np.float32)


def future(motion: Any, t0_us: int) -> Truth | None:
    """What was driven after t0; None where the clip ends before."""
    times = t0_us + _STEP_US * np.arange(FUTURE_POINTS + 1)
    begin, end = motion.time_range
    if times[0] < begin or times[-1] > end:
        return None
    xyz, rot = _seen_from(motion(times).pose, 0)
    yaw = np.unwrap(np.arctan2(rot[1:, 1, 0], rot[1:, 0, 0]))
    return Truth(xyz[1:].astype(np.float32), yaw.astype(np.float32))


def _seen_from(pose: Any, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions and rotations of a series of poses in the frame of one of them."""
    relative = pose[index].inv() * pose
    return relative.translation, relative.rotation.as_matrix()
