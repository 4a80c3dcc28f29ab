"""Rotary position embeddings: the interleaved three-axis form of Qwen3-VL's text stack, and the two-axis form of its
vision tower. Angles are computed in float32; only cosine and sine are cast to the activations' type.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flashdrive_node.model.config import DecoderConfig, VisionConfig


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # tables made during inference must serve training as well
def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angular step of every rotary pair: ``theta ** (-2k / head_dim)``, float32 [head_dim / 2].

    Computed on the CPU whatever the device, so that every device has the same bits.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1.0 / (theta**exponent)).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # tables made during inference must serve training as well
def mrope_axes(section: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Axis (0 time, 1 height, 2 width) that drives each rotary pair, int64 [head_dim / 2].

    Height takes pairs 1, 4, 7, ..., width takes pairs 2, 5, 8, ... as many as their sections say; time takes the rest
    (``mrope_interleaved`` of Qwen3-VL).
    """
    axes = torch.zeros(head_dim // 2, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes.to(device)


def mrope_cos_sin(positions: Tensor, config: DecoderConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every token's rotation, as `rotate` takes them.

    Args:
        positions: Integer positions on the three axes, [3, T].
        config: Gives head_dim, theta and the sections.
        dtype: Type of the result.

    Returns:
        cos, sin: each [T, head_dim].
    """
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, positions.device)
    axes = mrope_axes(config.mrope_section, config.head_dim, positions.device)
    return _cos_sin(positions.float()[axes].T * frequencies, dtype)


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Angles of the pairs [T, head_dim / 2] -> both halves of cosine and signed sine, [T, head_dim] each."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def vision_cos_sin(rows: Tensor, cols: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every patch's rotation in the vision tower, float32 [patches, head_dim] each.

    Args:
        rows, cols: Patch coordinates, integer [patches].
        config: Gives head_dim; a quarter of it are frequencies of the row, a quarter of the column.
    """
    frequencies = inverse_frequencies(config.head_dim // 2, 10000.0, rows.device)
    angles = torch.cat((rows.float()[:, None] * frequencies, cols.float()[:, None] * frequencies), dim=-1)
    return _cos_sin(angles, torch.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (k, k + head_dim / 2) of the last dimension.

    Args:
        x: [T, heads, head_dim].
        cos: [T, head_dim].
        sin: [T, head_dim], its first half negated: so the pair's other member is a plain shift away.
    """
    straight, turned = x * cos[:, None], x.roll(x.shape[-1] // 2, dims=-1)
    if x.is_cuda:
        return torch.addcmul(straight, turned, sin[:, None])  # one kernel less
    # On the CPU addcmul does not round the product, which the reference does.
    return straight + turned * sin[:, None]
