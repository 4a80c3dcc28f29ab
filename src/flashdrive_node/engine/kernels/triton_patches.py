"""Resize of frames and cutting into patches in Triton, in the integers of the uint8 kernel on CPUs.

Columns first, then rows, each rounded and cut off to 0..255: an output has some 15 taps, which are gathered, so nothing
is as large as the frame but the frame.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options

if TYPE_CHECKING:
    from flashdrive_node.engine.kernels.patches import Taps


def resize_columns(frames: Tensor, taps: Taps) -> Tensor:
    """Resize along the width: uint8 [N, 3, H, W], of any strides -> uint8 [N, H, 3, columns]."""
    count, channels, height, width = frames.shape
    columns = len(taps.first)
    out = torch.empty(count, height, channels, columns, dtype=torch.uint8, device=frames.device)
    block = min(512, triton.next_power_of_2(columns))
    _columns[(count * height, triton.cdiv(columns, block))](
        frames,
        taps.first,
        taps.weights,
        out,
        height,
        width,
        columns,
        *frames.stride(),
        TAPS=taps.count,
        BITS=taps.bits,
        CHANNELS=channels,
        BLOCK=block,
        num_warps=4,
        **options(frames.device),
    )
    return out


def resize_rows_into_patches(
    narrow: Tensor, taps: Taps, levels: Tensor, patch: int, merge: int, temporal: int
) -> Tensor:
    """Resize along the height, normalise, and put pixels where `images.patchify` has them.

    Args:
        narrow: uint8 [N, H, 3, columns].
        taps: Of the height.
        levels: What the values of a pixel become, [256].
        patch, merge, temporal: Sizes of patches, of an image token's side in patches, and of a patch in time.

    Returns:
        [N x patches, 3 * temporal * patch * patch] in the type of `levels`.
    """
    count, height, channels, columns = narrow.shape
    rows = len(taps.first)
    shape = (count * (rows // patch) * (columns // patch), channels * temporal * patch * patch)
    out = torch.empty(shape, dtype=levels.dtype, device=narrow.device)
    block = min(1024, triton.next_power_of_2(columns))
    _rows[(count * rows, channels, triton.cdiv(columns, block))](
        narrow,
        taps.first,
        taps.weights,
        levels,
        out,
        height,
        rows,
        columns,
        TAPS=taps.count,
        BITS=taps.bits,
        CHANNELS=channels,
        PATCH=patch,
        MERGE=merge,
        TEMPORAL=temporal,
        BLOCK=block,
        num_warps=4,
        **options(narrow.device),
    )
    return out


@triton.jit
def _columns(
    frames,
    first,
    weights,
    out,
    height,
    width,
    columns,
    frame_stride,
    channel_stride,
    row_stride,
    column_stride,
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    line = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < columns
    start = tl.load(first + column, mask=known, other=0)
    row = frames + (line // height).to(tl.int64) * frame_stride + (line % height).to(tl.int64) * row_stride
    place = out + line.to(tl.int64) * CHANNELS * columns + column
    for channel in tl.static_range(CHANNELS):
        total = tl.full([BLOCK], 1 << (BITS - 1), tl.int32)
        for tap in tl.static_range(TAPS):
            weight = tl.load(weights + tap * columns + column, mask=known, other=0)
            source = tl.minimum(start + tap, width - 1) * column_stride + channel * channel_stride
            total += tl.load(row + source, mask=known, other=0).to(tl.int32) * weight
        value = tl.minimum(tl.maximum(total >> BITS, 0), 255)
        tl.store(place + channel * columns, value.to(tl.uint8), mask=known)


@triton.jit
def _rows(
    narrow,
    first,
    weights,
    levels,
    out,
    height,
    rows,
    columns,
    TAPS: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    TEMPORAL: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    frame, y = tl.program_id(0) // rows, tl.program_id(0) % rows
    channel = tl.program_id(1)
    x = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    known = x < columns
    start = tl.load(first + y)
    total = tl.full([BLOCK], 1 << (BITS - 1), tl.int32)
    for tap in tl.static_range(TAPS):
        weight = tl.load(weights + tap * rows + y)
        line = (frame * height + tl.minimum(start + tap, height - 1)).to(tl.int64)
        total += tl.load(narrow + (line * CHANNELS + channel) * columns + x, mask=known, other=0).to(tl.int32) * weight
    value = tl.load(levels + tl.minimum(tl.maximum(total >> BITS, 0), 255), mask=known, other=0.0)
    # Patches run through blocks of MERGE x MERGE, row by row in a block and block by block.
    patch_y, patch_x = y // PATCH, x // PATCH
    token = (frame * (rows // PATCH // MERGE) + patch_y // MERGE) * (columns // PATCH // MERGE) + patch_x // MERGE
    patch = (token * MERGE + patch_y % MERGE) * MERGE + patch_x % MERGE
    place = out + (patch * CHANNELS + channel).to(tl.int64) * (TEMPORAL * PATCH * PATCH) + y % PATCH * PATCH + x % PATCH
    for slot in tl.static_range(TEMPORAL):
        tl.store(place + slot * PATCH * PATCH, value, mask=known)
