"""Image bytes of a message to RGB uint8 [H, W, 3]; malformed input is refused with what was required and found."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from flashdrive_node.runtime.observation import RawImage

Pixels = NDArray[np.uint8]

# Orientation tags of a camera are no reason to turn the picture: its rig is fixed. Decoding straight to RGB came with
# OpenCV 4.11; before that the channels are swapped afterwards.
_TO_RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)
_FLAGS = (cv2.IMREAD_COLOR if _TO_RGB is None else _TO_RGB) | cv2.IMREAD_IGNORE_ORIENTATION


class DecodeError(ValueError):
    """An image that cannot be decoded; states what was required and found."""


def decode_image(
    image: RawImage, max_pixels: int = 4096 * 4096, width: int | None = None, height: int | None = None
) -> Pixels:
    """RGB picture of one message, C-contiguous uint8 [H, W, 3]; without a copy for unpadded rgb8.

    Args:
        image: The message's content.
        max_pixels: Larger images are refused before anything is decoded.
        width: Required width in pixels, or None.
        height: Required height in pixels, or None.

    Raises:
        DecodeError: Unknown encoding, wrong size of row or data, corrupt file, wrong or excessive image size.
    """
    data = np.frombuffer(image.data, np.uint8)
    # A raw image without size must not pass as a file.
    is_file = image.compressed and image.encoding not in ENCODINGS
    found_width, found_height = compressed_size(data) if is_file else (image.width, image.height)
    if found_width < 1 or found_height < 1:
        raise DecodeError(f"image must have at least one pixel, found {found_width} x {found_height}")
    if found_width * found_height > max_pixels:
        raise DecodeError(f"image must have at most {max_pixels} pixels, found {found_width} x {found_height}")
    if (width is not None and found_width != width) or (height is not None and found_height != height):
        raise DecodeError(f"image must be {width} x {height} pixels, found {found_width} x {found_height}")
    if is_file:
        return _decode_file(data, found_width, found_height)
    return _decode_rows(image, data)


def signature(image: RawImage) -> int:
    """CRC of the bytes: equal for pictures that a camera repeats."""
    return zlib.crc32(np.frombuffer(image.data, np.uint8).data)


def compressed_size(data: Pixels) -> tuple[int, int]:
    """Width and height that the header of a JPEG or PNG file states.

    Raises:
        DecodeError: Neither of the two formats, or cut off within the header.
    """
    head = data[:24].tobytes()
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        if len(head) < 24 or head[12:16] != b"IHDR":
            raise DecodeError(f"PNG must start with an IHDR chunk, found {len(data)} bytes without one")
        return struct.unpack(">II", head[16:24])
    if head.startswith(b"\xff\xd8"):
        return _jpeg_size(data)
    raise DecodeError(
        f"compressed image must be JPEG or PNG, found {len(data)} bytes that start with {head[:4].hex() or 'nothing'}"
    )


def _jpeg_size(data: Pixels) -> tuple[int, int]:
    at, size = 2, len(data)
    while at + 9 <= size:
        if data[at] != 0xFF:
            raise DecodeError(f"JPEG must have a marker at byte {at}, found {int(data[at]):#04x}")
        marker = int(data[at + 1])
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack(">HH", data[at + 5 : at + 9].tobytes())
            return width, height
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a length
            at += 2
        else:
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4].tobytes())[0]
    raise DecodeError(f"JPEG of {size} bytes has no start of frame")


def _decode_file(data: Pixels, width: int, height: int) -> Pixels:
    if data[0] == 0xFF and b"\xff\xd9" not in data[-4096:].tobytes():
        # The decoder would fill the missing rows with grey and only warn. Cameras may pad behind the marker.
        raise DecodeError(f"JPEG of {len(data)} bytes is cut off: it must end with an end-of-image marker")
    try:
        pixels = cv2.imdecode(data, _FLAGS)  # releases the GIL
    except cv2.error as error:
        raise DecodeError(f"compressed image of {len(data)} bytes is corrupt: {error}") from error
    if pixels is None:
        raise DecodeError(f"compressed image of {len(data)} bytes ({width} x {height}) is corrupt")
    if pixels.shape != (height, width, 3):
        raise DecodeError(f"compressed image must be {width} x {height} as its header says, found {pixels.shape}")
    return np.asarray(pixels if _TO_RGB is not None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)


def _decode_rows(image: RawImage, data: Pixels) -> Pixels:
    entry = ENCODINGS.get(image.encoding)
    if entry is None:
        raise DecodeError(f"encoding must be one of {', '.join(ENCODINGS)}, found {image.encoding!r}")
    bytes_per_pixel, even_width, convert = entry
    width, height, step = image.width, image.height, image.step
    planar = image.encoding in ("nv12", "nv21")
    if (even_width and width % 2) or (planar and height % 2):
        raise DecodeError(f"{image.encoding} must have an even size, found {width} x {height}")
    if step < width * bytes_per_pixel:
        raise DecodeError(
            f"step of {image.encoding} must be at least {width} x {bytes_per_pixel} = {width * bytes_per_pixel} bytes, "
            f"found {step}"
        )
    rows = height * 3 // 2 if planar else height
    # The last row need not be padded.
    least = step * (rows - 1) + width * bytes_per_pixel
    if len(data) < least or len(data) > step * rows:
        raise DecodeError(
            f"data of {rows} rows must be step x rows = {step} x {rows} = {step * rows} bytes, found {len(data)}"
        )
    # as_strided because of that last row; the bounds were checked above.
    table = np.lib.stride_tricks.as_strided(data, (rows, width * bytes_per_pixel), (step, 1), writeable=False)
    return np.ascontiguousarray(convert(table, image))


def _channels(order: list[int]) -> Callable[[Pixels, RawImage], Pixels]:
    def convert(table: Pixels, image: RawImage) -> Pixels:
        pixels = table.reshape(image.height, image.width, -1)
        return pixels if order == [0, 1, 2] and pixels.shape[2] == 3 else pixels[:, :, order]

    return convert


def _mono16(table: Pixels, image: RawImage) -> Pixels:
    # The high byte of each pixel.
    return np.repeat(table[:, 0 if image.is_bigendian else 1 :: 2, None], 3, axis=2)


def _cvt(name: str, shape: Callable[[Pixels], Pixels] = lambda table: table) -> Callable[[Pixels, RawImage], Pixels]:
    # By name: the numbers of conversion and type codes differ between OpenCV versions.
    code = getattr(cv2, name)
    return lambda table, image: np.asarray(cv2.cvtColor(shape(np.ascontiguousarray(table)), code), np.uint8)


def _pairs(table: Pixels) -> Pixels:
    return table.reshape(table.shape[0], -1, 2)


_UYVY, _YUYV = _cvt("COLOR_YUV2RGB_UYVY", _pairs), _cvt("COLOR_YUV2RGB_YUY2", _pairs)

#: Encoding -> (bytes per pixel of a row, width must be even, rows [R, W * bytes] -> RGB [H, W, 3]).
ENCODINGS: dict[str, tuple[int, bool, Callable[[Pixels, RawImage], Pixels]]] = {
    "rgb8": (3, False, _channels([0, 1, 2])),
    "bgr8": (3, False, _cvt("COLOR_BGR2RGB", lambda table: table.reshape(table.shape[0], -1, 3))),
    "rgba8": (4, False, _cvt("COLOR_RGBA2RGB", lambda table: table.reshape(table.shape[0], -1, 4))),
    "bgra8": (4, False, _cvt("COLOR_BGRA2RGB", lambda table: table.reshape(table.shape[0], -1, 4))),
    "mono8": (1, False, _channels([0, 0, 0])),
    "mono16": (2, False, _mono16),
    "yuv422": (2, True, _UYVY),
    "uyvy": (2, True, _UYVY),
    "yuv422_yuy2": (2, True, _YUYV),
    "yuyv": (2, True, _YUYV),
    "nv12": (1, True, _cvt("COLOR_YUV2RGB_NV12")),
    "nv21": (1, True, _cvt("COLOR_YUV2RGB_NV21")),
    # OpenCV names a Bayer pattern by its second row's second and third pixel: rggb is "BG".
    "bayer_rggb8": (1, False, _cvt("COLOR_BayerBG2RGB")),
    "bayer_bggr8": (1, False, _cvt("COLOR_BayerRG2RGB")),
    "bayer_gbrg8": (1, False, _cvt("COLOR_BayerGR2RGB")),
    "bayer_grbg8": (1, False, _cvt("COLOR_BayerGB2RGB")),
}
