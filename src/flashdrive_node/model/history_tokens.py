"""Ego history as tokens: differences of consecutive positions, in bins."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import InputError

#: Tolerances of the checks, wide enough for float32 poses that came through a map frame kilometres across.
ORIGIN_TOLERANCE_M = 1e-3
ROTATION_TOLERANCE = 1e-3


def check_history(xyz: Tensor, rot: Tensor, poses: int) -> None:
    """Refuse a history that the model was not made for.

    Args:
        xyz: Ego positions in the vehicle frame at t0, metres, oldest first: [..., poses, 3].
        rot: Ego rotations, [..., poses, 3, 3].
        poses: Number of poses that the checkpoint takes.

    Raises:
        InputError: Wrong shape, a value that is not finite, a matrix that is not a rotation, or a last pose that is
            not the origin looking along x; lists everything found.
    """
    if xyz.shape[-2:] != (poses, 3) or rot.shape != (*xyz.shape[:-2], poses, 3, 3):
        raise InputError(
            f"ego history: positions [..., {poses}, 3] and rotations [..., {poses}, 3, 3] are required, found "
            f"{list(xyz.shape)} and {list(rot.shape)}"
        )
    if not (xyz.is_floating_point() and rot.is_floating_point()):
        raise InputError(f"ego history: floating point is required, found {xyz.dtype} and {rot.dtype}")
    finite = xyz.isfinite().all(-1) & rot.isfinite().flatten(-2).all(-1)
    if not finite.all():
        raise InputError(f"ego history: finite poses are required, found NaN or infinity in pose {_first(~finite)}")
    problems = []
    rot = rot.double()
    skew = (rot @ rot.mT - torch.eye(3, dtype=rot.dtype, device=rot.device)).abs().amax((-2, -1))
    bad = (skew > ROTATION_TOLERANCE) | (torch.linalg.det(rot) < 0)
    if bad.any():
        problems.append(f"pose {_first(bad)} is not a rotation (tolerance {ROTATION_TOLERANCE})")
    offset_m = float(xyz[..., -1, :].abs().max())
    if offset_m > ORIGIN_TOLERANCE_M:
        problems.append(
            f"the last position must be the origin (tolerance {ORIGIN_TOLERANCE_M} m), found {offset_m:.4g} m away"
        )
    turn = float((rot[..., -1, :, :] - torch.eye(3, dtype=rot.dtype, device=rot.device)).abs().max())
    if turn > ROTATION_TOLERANCE:
        problems.append(
            f"the last rotation must be the identity (tolerance {ROTATION_TOLERANCE}), found {turn:.4g} off"
        )
    if problems:
        raise InputError("ego history: " + "; ".join(problems))


def _first(bad: Tensor) -> int:
    """Index along the last axis of the first true entry."""
    return int(bad.nonzero()[0, -1])


def encode_history(xyz: Tensor, rot: Tensor, config: AlpamayoConfig) -> Tensor:
    """Token ids of ego positions, x, y, z of each step.

    A zero row stands in front of the positions, so the first difference is the oldest position itself. Rotations are
    checked and not encoded.

    Args:
        xyz: Ego positions in the vehicle frame at t0, metres, oldest first: float [..., poses, 3].
        rot: Ego rotations, float [..., poses, 3, 3].
        config: Bins, their first id and the number of poses.

    Returns:
        int64 [..., 3 x poses].

    Raises:
        InputError: See `check_history`.
    """
    check_history(xyz, rot, config.history_poses)
    bins = config.history_tokenizer
    low, high = xyz.new_tensor(bins.ego_xyz_min), xyz.new_tensor(bins.ego_xyz_max)
    steps = torch.cat((xyz[..., :1, :], xyz.diff(dim=-2)), dim=-2)
    fraction = (steps - low) / (high - low)
    index = (fraction * (bins.num_bins - 1)).round().long().clamp(0, bins.num_bins - 1)
    return index.flatten(-2) + config.tokens.history_token_start


def decode_history(ids: Tensor, config: AlpamayoConfig) -> Tensor:
    """Positions in metres that history tokens stand for, float32 [..., poses, 3].

    Exact to half a bin per step where no step left the bins; errors of the steps add up.

    Raises:
        InputError: Wrong number of tokens, or ids that are not history bins.
    """
    bins, start = config.history_tokenizer, config.tokens.history_token_start
    count = config.tokens_per_history_traj
    if ids.shape[-1] != count:
        raise InputError(f"history tokens: {count} are required, found {ids.shape[-1]}")
    index = ids - start
    if ((index < 0) | (index >= bins.num_bins)).any():
        raise InputError(
            f"history tokens: ids {start} to {start + bins.num_bins - 1} are required, found {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    low, high = torch.tensor(bins.ego_xyz_min), torch.tensor(bins.ego_xyz_max)
    fraction = index.unflatten(-1, (-1, 3)).float() / (bins.num_bins - 1)
    return (fraction * (high - low).to(ids.device) + low.to(ids.device)).cumsum(-2)
