"""The step from chosen frames and ego history to an observation."""

from __future__ import annotations

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.runtime.ego_history import EgoWindow
from flashdrive_node.runtime.frames import FrameWindow


def build_observation(window_id: int, window: FrameWindow, ego: EgoWindow, nav_text: str | None) -> Observation:
    """Join decoded frames and ego history of one t0 into what the engine takes.

    Args:
        window_id: Number of the observation, increasing.
        window: Chosen frames, every one of them decoded.
        ego: History that ends at the window's t0.
        nav_text: Navigation instruction or None.

    Raises:
        ValueError: The two are of different times, or a frame has no decoded image.
    """
    if ego.t0_ns != window.t0_ns:
        raise ValueError(f"ego history ends at {ego.t0_ns} ns, the frames of window {window_id} at {window.t0_ns} ns")
    cameras = []
    for camera in window.cameras:
        images = tuple(frame.pixels for frame in camera.frames if frame.pixels is not None)
        if len(images) != len(camera.frames):
            raise ValueError(
                f"window {window_id}: camera {camera.index} has {len(images)} of {len(camera.frames)} frames"
            )
        cameras.append(CameraFrames(camera.index, camera.stamps_ns, images))
    return Observation(window_id, window.t0_ns, tuple(cameras), ego.xyz, ego.rot, nav_text)
