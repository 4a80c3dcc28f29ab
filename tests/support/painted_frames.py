"""Images that say which frame they are: a camera index and a frame number as large black and white cells.

The code survives JPEG, a resize and a change of colour channels, so a test can ask of any picture that reached the
engine which frame of which camera it is. 32 bits fill a grid of 8 x 4 cells, most significant bit first:
4 bits camera index, 20 bits frame number, 8 bits checksum.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

COLUMNS, ROWS = 8, 4
BLACK, WHITE = 16, 235
MAX_FRAME = (1 << 20) - 1


class Painted(NamedTuple):
    """What an image says it is."""

    camera_index: int
    frame: int


class UnreadableError(ValueError):
    """The picture carries no valid code."""


def _checksum(payload: int) -> int:
    return (payload * 2654435761 >> 13) & 0xFF ^ 0xA5


def paint(camera_index: int, frame: int, width: int = 320, height: int = 192) -> NDArray[np.uint8]:
    """RGB image uint8 [height, width, 3] that carries the code."""
    if not (0 <= camera_index < 16 and 0 <= frame <= MAX_FRAME):
        raise ValueError(f"camera index 0..15 and frame 0..{MAX_FRAME} required, found {camera_index} and {frame}")
    payload = camera_index << 20 | frame
    word = payload << 8 | _checksum(payload)
    bits = np.array([word >> shift & 1 for shift in range(31, -1, -1)], dtype=np.uint8).reshape(ROWS, COLUMNS)
    cells = bits * np.uint8(WHITE - BLACK) + np.uint8(BLACK)
    gray = cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.ascontiguousarray(np.repeat(gray[:, :, None], 3, axis=2))


def paint_jpeg(camera_index: int, frame: int, width: int = 320, height: int = 192, quality: int = 80) -> bytes:
    """The same image as a JPEG file."""
    done, data = cv2.imencode(
        ".jpg", paint(camera_index, frame, width, height), [int(cv2.IMWRITE_JPEG_QUALITY), quality]
    )
    if not done:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return data.tobytes()


def read_painted(image: NDArray[np.uint8]) -> Painted:
    """Decode the code of an image uint8 [height, width] or [height, width, channels] of any size.

    Raises:
        UnreadableError: The checksum does not fit, so this is not a painted frame, or it is damaged.
    """
    height, width = image.shape[:2]
    word = 0
    for row in range(ROWS):
        for column in range(COLUMNS):
            # The middle half of a cell only: its edges are blurred by resize and JPEG.
            top, left = (4 * row + 1) * height // (4 * ROWS), (4 * column + 1) * width // (4 * COLUMNS)
            bottom, right = (4 * row + 3) * height // (4 * ROWS), (4 * column + 3) * width // (4 * COLUMNS)
            cell = image[top : max(bottom, top + 1), left : max(right, left + 1)]
            word = word << 1 | int(cell.mean() > (BLACK + WHITE) / 2)
    payload, found = word >> 8, word & 0xFF
    if found != _checksum(payload):
        raise UnreadableError(f"checksum {_checksum(payload):#04x} required, found {found:#04x} in {width} x {height}")
    return Painted(payload >> 20, payload & MAX_FRAME)
