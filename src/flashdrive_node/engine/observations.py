"""Observations as the model's stages read them, and one that stands for none."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model.config import AlpamayoConfig


def ego_history(observation: Observation) -> tuple[Tensor, Tensor]:
    """Ego positions and rotations, on the host."""
    return torch.from_numpy(observation.ego_history_xyz), torch.from_numpy(observation.ego_history_rot)


def camera_layout(observation: Observation) -> tuple[list[int], int]:
    """Camera indices, and frames of each."""
    return [camera.camera_index for camera in observation.cameras], len(observation.cameras[0].images)


def grey_window(settings: PlainSettings, config: AlpamayoConfig, window: int) -> Observation:
    """Grey pictures at walking pace, for a warm-up; frames move on by one from window to window."""
    picture = np.full((*settings.image_size, 3), 127, np.uint8)
    poses = config.history_poses
    xyz = np.zeros((poses, 3), np.float32)
    xyz[:, 0] = np.arange(1 - poses, 1) * config.action_space.dt
    nav = "Continue straight" if config.supports_navigation and settings.guidance_weight != 1 else None
    stamps = tuple(range(window, window + settings.frames))
    return Observation(
        window_id=-1,
        t0_ns=0,
        cameras=tuple(CameraFrames(camera, stamps, (picture,) * settings.frames) for camera in settings.cameras),
        ego_history_xyz=xyz,
        ego_history_rot=np.tile(np.eye(3, dtype=np.float32), (poses, 1, 1)),
        nav_text=nav,
    )
