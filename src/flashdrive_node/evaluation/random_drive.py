"""Windows that cost what windows of a drive cost, without a recording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.model.config import AlpamayoConfig


class RandomDrive:
    """Endless windows of a straight drive at 10 m/s, one new frame per camera in each.

    Pixels are random (zeros would run faster than pictures do), from a small pool that is gone through in turn.
    """

    def __init__(
        self, config: AlpamayoConfig, image_size: tuple[int, int], cameras: Sequence[int], frames: int, seed: int = 0
    ):
        """`image_size` is height and width in pixels, `frames` how many of each camera are in a window."""
        rng = np.random.default_rng(seed)
        self.image_size = image_size
        self.cameras = tuple(cameras)
        self.frames = frames
        self.pictures = {
            camera: [rng.integers(0, 256, (*image_size, 3), dtype=np.uint8) for _ in range(frames + 1)]
            for camera in cameras
        }
        poses = config.history_poses
        self.xyz = np.zeros((poses, 3), np.float32)
        self.xyz[:, 0] = np.arange(1 - poses, 1) * config.action_space.dt * 10
        self.rot = np.tile(np.eye(3, dtype=np.float32), (poses, 1, 1))

    def window(self, index: int) -> Observation:
        """Window number `index`; frames are 0.1 s apart."""
        numbers = range(index, index + self.frames)
        stamps_ns = tuple(n * 100_000_000 for n in numbers)
        cameras = tuple(
            CameraFrames(camera, stamps_ns, tuple(pool[n % len(pool)] for n in numbers))
            for camera, pool in self.pictures.items()
        )
        return Observation(index, stamps_ns[-1], cameras, self.xyz, self.rot)
