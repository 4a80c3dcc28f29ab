"""What the sensors delivered, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
