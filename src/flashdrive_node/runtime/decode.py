"""Image bytes of a message to RGB uint8 [H, W, 3], with every malformed input named, and a small pool that does it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.runtime.observation import RawImage


class DecodeError(ValueError):
    """An image that cannot be decoded; states what was required and found."""


def decode_image(
    image: RawImage, max_pixels: int = 4096 * 4096, width: int | None = None, height: int | None = None
) -> NDArray[np.uint8]:
    """RGB picture of one message, C-contiguous uint8 [H, W, 3].

    Args:
        image: The message's content.
        max_pixels: Larger images are refused before anything is decoded.
        width: Required width in pixels, or None.
        height: Required height in pixels, or None.

    Raises:
        DecodeError: Unknown encoding, wrong size of row or data, corrupt file, wrong or excessive image size.
    """
    raise NotImplementedError
