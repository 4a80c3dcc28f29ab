"""Rendered pictures as files: JPEG and PNG that carry their stamp beside the pixels.

A rendered camera has no noise: at a standstill its files would be equal to the byte, and the node would rightly take
that for a camera that hangs. So each has its stamp as a comment of the JPEG or a text of the PNG.
"""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

#: Formats by the name that messages give them; png keeps every grey level.
FORMATS = ("jpeg", "png")


def jpeg_file(picture: Picture, stamp_ns: int, quality: int) -> bytes:
    """A picture RGB uint8 [H, W, 3] as JPEG; quality 0 to 100."""
    file = _encoded(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1])
    text = _text(stamp_ns)
    # Right behind the start-of-image marker.
    return file[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + file[2:]


def png_file(picture: Picture, stamp_ns: int) -> bytes:
    """A picture RGB uint8 [H, W, 3] as PNG, which keeps every grey level."""
    file = _encoded(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    body = b"tEXt" + b"Comment\x00" + _text(stamp_ns)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    # Behind the header chunk, which comes first: 8 bytes of signature, 25 of IHDR.
    return file[:33] + chunk + file[33:]


def _text(stamp_ns: int) -> bytes:
    return f"stamp {stamp_ns} ns".encode("ascii")


def _encoded(suffix: str, picture: Picture, parameters: list[int]) -> bytes:
    ok, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), parameters)
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a picture {picture.shape} as {suffix}")
    return bytes(data.tobytes())
