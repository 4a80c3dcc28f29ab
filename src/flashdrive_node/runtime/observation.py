"""What the sensors delivered, as plain data, and the step from chosen frames and ego history to an observation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.engine.protocol import CameraFrames, Observation

if TYPE_CHECKING:
    from flashdrive_node.runtime.ego_history import EgoWindow
    from flashdrive_node.runtime.frames import FrameWindow

#: Whatever supports the buffer protocol: bytes, memoryview, array.array, a uint8 array.
Buffer = bytes | bytearray | memoryview | NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class RawImage:
    """One image as its message carried it; the bytes are not copied."""

    #: Header stamp, nanoseconds.
    stamp_ns: int
    #: ``time.monotonic_ns()`` when it arrived.
    received_ns: int
    #: Encoding of sensor_msgs/Image ("rgb8", "nv12", ...) or format of sensor_msgs/CompressedImage ("jpeg", ...).
    encoding: str
    #: Pixels; 0 for compressed images, whose header says it.
    width: int
    height: int
    #: Bytes per row including padding; 0 for compressed images.
    step: int
    is_bigendian: bool
    data: Buffer

    @property
    def compressed(self) -> bool:
        """Whether ``data`` is a JPEG or PNG file instead of rows of pixels."""
        return self.step == 0 and self.width == 0 and self.height == 0


@dataclass(frozen=True)
class OdometrySample:
    """One pose and twist of the vehicle (nav_msgs/Odometry)."""

    stamp_ns: int
    #: Frame that the pose is given in, for example "odom" or "map".
    frame_id: str
    #: Frame of the vehicle whose pose it is and that the twist is given in, for example "base_link".
    child_frame_id: str
    #: Metres in ``frame_id``.
    position: tuple[float, float, float]
    orientation_xyzw: tuple[float, float, float, float]
    #: m/s in ``child_frame_id``.
    linear_velocity: tuple[float, float, float]
    #: rad/s in ``child_frame_id``.
    angular_velocity: tuple[float, float, float]


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
