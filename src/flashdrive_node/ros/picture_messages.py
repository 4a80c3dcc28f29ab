"""Rendered pictures as camera drivers publish them: JPEG, PNG or rows of pixels, and the camera's calibration.

Every picture carries its stamp beside the pixels (a comment of the JPEG, a text of the PNG, the padding of the rows).
A rendered camera has no noise: at a standstill its files would be equal to the byte, and the node would rightly take
that for a camera that hangs.
"""

from __future__ import annotations

import math
import struct
import zlib
from array import array

import cv2
import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from flashdrive_node.ros.messages import stamp_ns
from flashdrive_node.world.camera import Camera

Picture = NDArray[np.uint8]

#: How pictures are compressed, by the format that the message names; png keeps every grey level.
FORMATS = ("jpeg", "png")
_JPEG_QUALITY = 95
#: Bytes behind each row of a raw image; those of the first row hold the stamp.
_PADDING = 8


def compressed_message(header: Header, picture: Picture, file_format: str) -> CompressedImage:
    """A picture RGB uint8 [H, W, 3] as JPEG or PNG.

    Raises:
        ValueError: Another format.
    """
    bgr = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), np.uint8)
    stamp = f"stamp {stamp_ns(header.stamp)} ns".encode("ascii")
    if file_format == "jpeg":
        data = _jpeg_with_comment(_encoded(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]), stamp)
    elif file_format == "png":
        data = _png_with_text(_encoded(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, 1]), stamp)
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
    half = math.radians(camera.field_of_view_deg) / 2
    ftheta = camera.projection == "ftheta"
    focal = width / 2 / (half if ftheta else math.tan(half))
    k = [focal, 0.0, (width - 1) / 2, 0.0, focal, (height - 1) / 2, 0.0, 0.0, 1.0]
    return CameraInfo(
        header=header,
        width=width,
        height=height,
        distortion_model="equidistant" if ftheta else "plumb_bob",
        d=[0.0] * (4 if ftheta else 5),
        k=k,
        r=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        p=[*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0],
    )


def _encoded(suffix: str, bgr: Picture, parameters: list[int]) -> bytes:
    ok, data = cv2.imencode(suffix, bgr, parameters)
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a picture {bgr.shape} as {suffix}")
    return data.tobytes()


def _jpeg_with_comment(file: bytes, text: bytes) -> bytes:
    # Right behind the start-of-image marker.
    return file[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + file[2:]


def _png_with_text(file: bytes, text: bytes) -> bytes:
    body = b"tEXt" + b"Comment\x00" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    # Behind the header chunk, which comes first: 8 bytes of signature, 25 of IHDR.
    return file[:33] + chunk + file[33:]
