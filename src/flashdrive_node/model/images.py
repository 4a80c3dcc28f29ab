"""Images as the vision tower takes them: resize, normalise, cut into patches.

The reference resizes with the native uint8 kernel of bicubic antialiased interpolation on the CPU. `resize_uint8` is
that kernel; `resize_on_device` computes the same integers as two matrix products on any device, so that frames can be
uploaded as they come and the patches stay equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import InputError

#: Frames of one camera: uint8 [N, 3, H, W], [N, H, W, 3], or N arrays [H, W, 3].
Frames = Tensor | NDArray[np.uint8] | Sequence[NDArray[np.uint8]]

#: Longest side over shortest side that the resize rule takes.
MAX_ASPECT_RATIO = 200


@lru_cache(maxsize=256)
def target_size(height: int, width: int, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """Height and width that an image is resized to: multiples of `factor`, within the pixel limits.

    Sides are rounded to multiples; where the product is too large both sides are scaled down and floored, where it is
    too small they are scaled up and ceiled, so that the aspect ratio stays close.

    Raises:
        InputError: A side is not positive, or the image is a sliver.
    """
    if min(height, width) < 1:
        raise InputError(f"image: positive sides are required, found height {height}, width {width}")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(f"image: an aspect ratio up to {MAX_ASPECT_RATIO} is required, found {width} x {height}")
    # Python rounds half to even, which the reference relies on.
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h, w = math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return h, w


def resize_uint8(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic antialiased resize in integers: uint8 [N, 3, H, W] on the CPU, of any memory format."""
    if images.shape[-2:] == size:
        return images
    return torch.nn.functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


def integer_weights(size_in: int, size_out: int) -> tuple[NDArray[np.int32], int]:
    """Weights of the uint8 kernel along one axis: int32 [size_out, size_in], and their number of fraction bits.

    Cubic convolution with a = -0.5, widened by the scale where the image shrinks, normalised, then rounded to as many
    fraction bits as keep the largest weight within 16 bits.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    center = scale * (np.arange(size_out) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    taps = np.minimum((center + support + 0.5).astype(np.int64), size_in) - first
    tap = np.arange(int(taps.max()))
    x = np.abs((first[:, None] + tap - center[:, None] + 0.5) * (1.0 / stretch))
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)) * (tap < taps[:, None])
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed in order, as the kernel does
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    rounded = np.trunc(weights * (1 << bits) + np.copysign(0.5, weights)).astype(np.int32)
    matrix = np.zeros((size_out, size_in + len(tap)), np.int32)
    np.put_along_axis(matrix, first[:, None] + tap, rounded, axis=1)
    return matrix[:, :size_in], bits


@lru_cache(maxsize=32)
def _split_weights(size_in: int, size_out: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, int]:
    """High and low bytes of `integer_weights`, both signed and up to 128: [2 x size_out, size_in], and the bits.

    Bytes and pixels are exact in bfloat16 (and TF32), and a row of products sums to far less than 2^24, so the
    products are exact on tensor cores whatever the order of summation.
    """
    weights, bits = integer_weights(size_in, size_out)
    low = (weights + 128) % 256 - 128
    stacked = np.concatenate(((weights - low) // 256, low))
    return torch.from_numpy(stacked).to(device, dtype), bits


def _round_off(products: Tensor, dim: int, bits: int) -> Tensor:
    """Put high and low halves along `dim` together and round to 0..255, int32."""
    high, low = products.to(torch.int32).chunk(2, dim)
    total = high * 256 + low
    return (total.add_(1 << (bits - 1)) >> bits).clamp_(0, 255)


def resize_on_device(images: Tensor, size: tuple[int, int]) -> Tensor:
    """What `resize_uint8` gives, on the device of `images`: uint8 [N, C, H, W] to uint8 [N, C, *size].

    Columns first, then rows, each rounded and clamped to 0..255. Equal to the CPU kernel in every value; with
    [1920, 1080] frames on a CUDA device the matrix products run on tensor cores.
    """
    n, channels, height, width = images.shape
    on_cuda = images.device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    if width != size[1]:
        weights, bits = _split_weights(width, size[1], images.device, dtype)
        rows = images.to(dtype, memory_format=torch.contiguous_format).view(-1, width)
        products = torch.mm(rows, weights.T, out_dtype=torch.float32) if on_cuda else rows @ weights.T
        images = _round_off(products, 1, bits).view(n, channels, height, size[1])
    if height != size[0]:
        weights, bits = _split_weights(height, size[0], images.device, dtype)
        planes = images.to(dtype, memory_format=torch.contiguous_format).view(-1, height, size[1])
        weights = weights.expand(len(planes), -1, -1)
        products = torch.bmm(weights, planes, out_dtype=torch.float32) if on_cuda else weights @ planes
        images = _round_off(products, 1, bits).view(n, channels, *size)
    return images.to(torch.uint8)


def patchify(images: Tensor, patch: int = 16, merge: int = 2, temporal: int = 2) -> Tensor:
    """Patch rows of images, of the same type: [N, C, H, W] -> [N x patches, C x temporal x patch x patch].

    Rows run through merge x merge blocks of patches row by row, and row by row within a block, so that merge^2
    consecutive rows form one image token. A single image fills all temporal slots.
    """
    n, channels, height, width = images.shape
    rows, cols = height // patch, width // patch
    blocks = images.reshape(n, channels, rows // merge, merge, patch, cols // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    blocks = blocks.expand(*blocks.shape[:6], temporal, patch, patch)
    return blocks.reshape(n * rows * cols, channels * temporal * patch * patch)


def normalise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0..255 to -1..1, computed in float32."""
    # By a tensor: CUDA divides by a Python number through its reciprocal, which rounds otherwise.
    half = torch.full((1,), 127.5, device=pixels.device)
    return ((pixels.float() - half) / half).to(dtype)


def as_batch(images: Frames, where: str = "images", pinned: bool = False) -> Tensor:
    """A uint8 batch [N, 3, H, W] from a tensor or decoded frames.

    Frames [H, W, 3] become a channels-last view of one copy, in page-locked memory if `pinned`, which uploads fast and
    without waiting; a tensor or a writeable contiguous array is not copied at all.

    Raises:
        InputError: Not uint8, not three channels, or frames of different sizes.
    """
    if isinstance(images, np.ndarray):
        plain = images.flags.writeable and images.flags.c_contiguous
        images = torch.from_numpy(images if plain else images.copy())
    if not isinstance(images, Tensor):
        check_frames(images, where)
        batch = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=pinned)
        np.stack(images, out=batch.numpy())
        images = batch
    if images.dtype != torch.uint8:
        raise InputError(f"{where}: uint8 is required, found {images.dtype}")
    if images.ndim == 4 and images.shape[1] == 3:
        return images
    if images.ndim == 4 and images.shape[3] == 3:
        return images.permute(0, 3, 1, 2)
    raise InputError(f"{where}: [N, 3, H, W] or [N, H, W, 3] is required, found {list(images.shape)}")


def check_frames(images: Sequence[NDArray[np.uint8]], where: str) -> None:
    """Check that frames of one camera can be one batch.

    Raises:
        InputError: None at all, not uint8 [height, width, 3], or of different sizes.
    """
    if not len(images):
        raise InputError(f"{where}: at least one image is required, found none")
    for i, image in enumerate(images):
        if image.dtype != np.uint8:
            raise InputError(f"{where}: uint8 is required, found {image.dtype} in image {i}")
        if image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"{where}: [height, width, 3] is required, found {list(image.shape)} in image {i}")
        if image.shape != images[0].shape:
            raise InputError(
                f"{where}: frames of one camera must have one size, found {list(images[0].shape)} in image 0 and "
                f"{list(image.shape)} in image {i}"
            )


def preprocess(
    cameras: Sequence[Frames],
    config: AlpamayoConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Patch rows and grids of all images of one prompt, in prompt order.

    Args:
        cameras: Per camera its frames, oldest first. Sizes may differ between cameras.
        config: Pixel limits and patch sizes.
        device: Where rows are wanted. On the CPU the native kernel runs, elsewhere `resize_on_device`.
        dtype: Type of the rows.

    Returns:
        Rows in -1..1, [patches of all images, patch features], and (rows, columns) of patches per image.

    Raises:
        InputError: See `as_batch` and `target_size`.
    """
    device = torch.device(device)
    if not cameras:
        raise InputError("images: at least one camera is required, found none")
    rows: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    for i, frames in enumerate(cameras):
        images = as_batch(frames, f"camera {i} of {len(cameras)}", pinned=device.type == "cuda")
        if device.type != "cpu":
            images = images.to(device, non_blocking=True)
        patches, grid = patch_rows(images, config, dtype)
        rows.append(patches)
        grids += [grid] * len(images)
    return torch.cat(rows) if len(rows) > 1 else rows[0], grids


def patch_rows(images: Tensor, config: AlpamayoConfig, dtype: torch.dtype) -> tuple[Tensor, tuple[int, int]]:
    """Patch rows of images that are where they are wanted: uint8 [N, 3, H, W] -> [N x patches, patch features].

    Returns:
        Rows in -1..1, and rows and columns of patches per image.
    """
    vision = config.vision
    size = target_size(images.shape[2], images.shape[3], config.min_pixels, config.max_pixels, vision.resize_factor)
    resized = resize_uint8(images, size) if images.device.type == "cpu" else resize_on_device(images, size)
    # Cutting and repeating bytes moves a quarter of what floats would.
    patches = patchify(resized, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    return normalise(patches, dtype), (size[0] // vision.patch_size, size[1] // vision.patch_size)
