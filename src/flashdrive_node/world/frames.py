"""Pictures of all cameras for scenes in lock-step, in chunks of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.world.camera import CAMERAS, Camera
from flashdrive_node.world.render import render
from flashdrive_node.world.scene import Scene, select
from flashdrive_node.world.state import State

#: Frames per camera that the model sees, one step apart, the newest at t0.
FRAMES = 4


@dataclass(frozen=True)
class FrameSettings:
    """Which pictures are made, and how."""

    cameras: Sequence[Camera] = CAMERAS
    width: int = 288
    height: int = 160
    #: Scenes per call of the renderer.
    chunk: int = 256
    #: See `render`: then all chunks have the same size, which fills up the last one.
    compiled: bool = False

    @classmethod
    def for_device(cls, device: torch.device | str, width: int = 288, height: int = 160) -> FrameSettings:
        """Large compiled chunks on a GPU, small ones on the CPU."""
        on_gpu = torch.device(device).type == "cuda"
        return cls(width=width, height=height, chunk=256 if on_gpu else 8, compiled=on_gpu)


def render_frames(scene: Scene, state: State, settings: FrameSettings) -> Tensor:
    """The picture of every camera: uint8 [S, cameras, H, W, 3].

    Args:
        scene, state: S scenes at one moment each.
        settings: Which pictures, and how.
    """
    scenes, parts = len(scene), []
    for first in range(0, scenes, settings.chunk):
        last = first + settings.chunk if settings.compiled else min(first + settings.chunk, scenes)
        rows = torch.arange(first, last, device=scene.device).clamp(max=scenes - 1)
        part, moment = select(scene, rows), select(state, rows)
        views = [
            render(part, moment, camera, settings.width, settings.height, compiled=settings.compiled).image
            for camera in settings.cameras
        ]
        parts.append(torch.stack(views, dim=1)[: scenes - first])
    return torch.cat(parts)
