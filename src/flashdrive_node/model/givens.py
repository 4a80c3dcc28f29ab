"""Pairwise (Givens) rotations of channels, as ParoQuant stores them (arXiv 2511.10645).

A rotation has rounds. In each, the channels of a group are split into pairs and every pair is turned by its own angle:
``y_i = cos(a) x_i + sin(a) x_j``, ``y_j = cos(a) x_j - sin(a) x_i``. Pairs of a round are disjoint, so the whole is
orthogonal, and turning back is the same rounds in reverse order by the negative angles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.model.errors import InputError


def pair_index(pairs: Tensor, group_size: int) -> Tensor:
    """Channels in the order of their pairs, checked.

    Args:
        pairs: Integers [rounds, K], each channel's number inside its group; neighbours 2t and 2t + 1 are one pair.
        group_size: Channels of a group.

    Returns:
        Channel numbers, int64 [rounds, K].

    Raises:
        InputError: The groups do not divide K, or a round does not hold every channel of a group exactly once.
    """
    if pairs.ndim != 2 or group_size < 2 or group_size % 2 or pairs.shape[1] % group_size:
        raise InputError(
            f"pairs [rounds, channels] in whole groups of {group_size} are required, found {list(pairs.shape)}"
        )
    grouped = pairs.long().unflatten(1, (-1, group_size))
    if not torch.equal(grouped.sort(dim=-1).values, torch.arange(group_size, device=pairs.device).expand_as(grouped)):
        raise InputError(f"pairs: every round must hold each channel 0 to {group_size - 1} of a group exactly once")
    first = torch.arange(0, pairs.shape[1], group_size, device=pairs.device)
    return (grouped + first[:, None]).flatten(1)


def rotate_pairs(x: Tensor, index: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels; differentiable in both tensors.

    Args:
        x: [..., K], of a floating type.
        index: Of `pair_index`; int32 will do.
        angles: Radians [rounds, K / 2], in x's type.

    Returns:
        [..., K].
    """
    cos, sin = angles.cos(), angles.sin()
    for order, back, c, s in zip(index, index.argsort(dim=1), cos, sin, strict=True):
        first, second = x.index_select(-1, order).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((c * first + s * second, c * second - s * first), dim=-1)
        x = turned.flatten(-2).index_select(-1, back)
    return x


def rotate_pairs_back(x: Tensor, index: Tensor, angles: Tensor) -> Tensor:
    """The inverse of `rotate_pairs`."""
    return rotate_pairs(x, index.flip(0), -angles.flip(0))


def rotation_blocks(index: Tensor, angles: Tensor, group_size: int) -> Tensor:
    """A rotation as one orthogonal matrix per group: [groups, group_size, group_size]; differentiable."""
    groups = index.shape[1] // group_size
    units = torch.eye(group_size, dtype=angles.dtype, device=angles.device).repeat(1, groups)
    return rotate_pairs(units, index, angles).unflatten(1, (groups, group_size)).transpose(0, 1)


def rotate_by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """What `rotate_pairs` gives, up to rounding: x [rows, K], blocks of `rotation_blocks` -> [rows, K]."""
    return torch.einsum("rgi,gij->rgj", x.unflatten(1, (len(blocks), -1)), blocks).flatten(1)


def random_pairs(channels: int, rounds: int, group_size: int, generator: torch.Generator) -> Tensor:
    """Pairs drawn at random, anew for every round and group.

    Returns:
        int16 [rounds, channels], in the form that `pair_index` takes.
    """
    groups = channels // group_size
    noise = torch.rand(rounds, groups, group_size, generator=generator)
    return noise.argsort(dim=-1).flatten(1).to(torch.int16)


def rotation_steps(index: Tensor, group_size: int) -> Tensor:
    """The same order of channels, each round's told from the round before, so that nothing is put back in between.

    Args:
        index: Of `pair_index`, [rounds, K].
        group_size: Of the same, 256 at most.

    Returns:
        uint8 [rounds + 1, K], numbers inside a group. Row 0: the channel that comes to each place. Row r: the place of
        round r - 1 from which it comes. Last row: the channel whose turned value stands there behind the last round.
    """
    back = index.argsort(dim=1)
    moved = torch.stack(
        [index[0].long(), *(back[r - 1][index[r].long()] for r in range(1, len(index))), index[-1].long()]
    )
    return (moved % group_size).to(torch.uint8)
