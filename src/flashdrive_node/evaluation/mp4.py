"""MP4 files from pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray


def write_mp4(path: Path, rate_hz: float, pictures: Iterable[NDArray[np.uint8]]) -> int:
    """Write pictures RGB uint8 [H, W, 3] of one size as a video; returns how many there were.

    Raises:
        OSError: No video can be written there, or there are no pictures.
    """
    writer: cv2.VideoWriter | None = None
    count = 0
    try:
        for picture in pictures:
            if writer is None:
                size = picture.shape[1], picture.shape[0]
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate_hz, size)
                if not writer.isOpened():
                    raise OSError(f"{path}: OpenCV cannot write an MP4 there")
            writer.write(np.ascontiguousarray(picture[..., ::-1]))
            count += 1
    finally:
        if writer is not None:
            writer.release()
    if not count:
        raise OSError(f"{path}: a video needs pictures, there are none")
    return count
