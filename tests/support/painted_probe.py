"""Probe of the fake engine that reads the painted frames, so that a test learns which pictures the engine saw."""

from __future__ import annotations

from flashdrive_node.engine.protocol import Observation
from support.painted_frames import read_painted


def painted_metrics(observation: Observation) -> dict[str, float]:
    """``camera_C_frame_I`` is the number painted into the I-th picture (oldest first) of camera C; -1: of another."""
    metrics = {}
    for camera in observation.cameras:
        for i, image in enumerate(camera.images):
            painted = read_painted(image)
            fits = painted.camera_index == camera.camera_index
            metrics[f"camera_{camera.camera_index}_frame_{i}"] = float(painted.frame if fits else -1)
    return metrics
