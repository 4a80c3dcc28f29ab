"""Frames as they come from a camera to the rows that the vision tower takes: resize, normalise, cut into patches."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.images import integer_weights, normalise, patch_rows, target_size

#: Rows and columns of patches.
Grid = tuple[int, int]


def frame_patches(frames: Tensor, config: AlpamayoConfig, dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """`images.patch_rows`, the same bits: two kernels, one for each axis of the resize, in place of some twenty.

    Args:
        frames: uint8 [N, 3, H, W] in any memory format; frames [N, H, W, 3] seen so are read as they are.
        config: Pixel limits and patch sizes.
        dtype: Of the rows.

    Returns:
        Rows in -1..1, [N x patches, patch features], and rows and columns of patches per image.
    """
    if not uses_triton(frames, dtype):
        return patch_rows(frames, config, dtype)
    from flashdrive_node.engine.kernels.triton_patches import resize_columns, resize_rows_into_patches

    vision, (height, width) = config.vision, (frames.shape[2], frames.shape[3])
    size = target_size(height, width, config.min_pixels, config.max_pixels, vision.resize_factor)
    narrow = resize_columns(frames, taps(width, size[1], frames.device))
    rows = resize_rows_into_patches(
        narrow,
        taps(height, size[0], frames.device),
        levels(frames.device, dtype),
        vision.patch_size,
        vision.spatial_merge_size,
        vision.temporal_patch_size,
    )
    return rows, (size[0] // vision.patch_size, size[1] // vision.patch_size)


class Taps:
    """Weights of the uint8 resize along one axis, without the zeros."""

    def __init__(self, size_in: int, size_out: int, device: torch.device):
        matrix, self.bits = integer_weights(size_in, size_out)
        used = matrix != 0
        first = used.argmax(axis=1)
        #: Weights of an output at most.
        self.count = int((size_in - used[:, ::-1].argmax(axis=1) - first).max())
        # Behind the edge the last pixel counts for nothing.
        place = np.minimum(first[:, None] + np.arange(self.count), size_in - 1)
        inside = first[:, None] + np.arange(self.count) < size_in
        weights = np.take_along_axis(matrix, place, axis=1) * inside
        #: First input of each output, int32 [size_out], and weights by tap, int32 [taps, size_out].
        self.first = torch.from_numpy(first.astype(np.int32)).to(device)
        self.weights = torch.from_numpy(np.ascontiguousarray(weights.T)).to(device)


@lru_cache(maxsize=32)
def taps(size_in: int, size_out: int, device: torch.device) -> Taps:
    """Weights from so many pixels to so many, on a device."""
    return Taps(size_in, size_out, device)


@lru_cache(maxsize=8)
def levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What each of the 256 values of a pixel becomes, by `images.normalise`."""
    return normalise(torch.arange(256, device=device), dtype)
