"""Rendered pictures as camera drivers publish them: JPEG, PNG or rows of pixels, and the camera's calibration.

Every picture carries its stamp beside the pixels, raw ones in the padding of their rows: see `picture_files`.
"""

from __future__ import annotations

import struct
from array import array

import numpy as np
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from flashdrive_node.evaluation.picture_files import FORMATS, Picture, jpeg_file, png_file
from flashdrive_node.evaluation.world_views import camera_model
from flashdrive_node.ros.messages import stamp_ns
from flashdrive_node.world.camera import Camera

_JPEG_QUALITY = 95
#: Bytes behind each row of a raw image; those of the first row hold the stamp.
_PADDING = 8


def compressed_message(header: Header, picture: Picture, file_format: str) -> CompressedImage:
    """A picture RGB uint8 [H, W, 3] as JPEG or PNG.

    Raises:
        ValueError: Another format.
    """
    if file_format == "jpeg":
        data = jpeg_file(picture, stamp_ns(header.stamp), _JPEG_QUALITY)
    elif file_format == "png":
        data = png_file(picture, stamp_ns(header.stamp))
    else:
        raise ValueError(f"format of a compressed picture must be one of {', '.join(FORMATS)}, found {file_format!r}")
    return CompressedImage(header=header, format=file_format, data=array("B", data))


def raw_message(header: Header, picture: Picture) -> Image:
    """A picture RGB uint8 [H, W, 3] as rgb8, with padded rows."""
    height, width, _ = picture.shape
    rows = np.zeros((height, 3 * width + _PADDING), np.uint8)
    rows[:, : 3 * width] = picture.reshape(height, 3 * width)
    rows[0, 3 * width :] = np.frombuffer(struct.pack("<q", stamp_ns(header.stamp)), np.uint8)
    data = array("B", rows.tobytes())
    return Image(header=header, height=height, width=width, encoding="rgb8", step=rows.shape[1], data=data)


def camera_info_message(header: Header, camera: Camera, width: int, height: int) -> CameraInfo:
    """Calibration of a camera of the world: an f-theta camera is the equidistant model without coefficients."""
    model = camera_model(camera, width, height)
    k = model.matrix()
    return CameraInfo(
        header=header,
        width=width,
        height=height,
        distortion_model=model.distortion_model,
        d=list(model.coefficients),
        k=k,
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0],
    )
