"""From what a layer computes to the rows that the next quantised product takes.

That is a norm (behind the residual sum) or the gate of the MLP, then rounding by the largest value of the row: one
kernel for 8-bit floats. For 4-bit weights channels are scaled and rotated in between, by a kernel of its own. All
products on the same input share the rows: q/k/v is one, gate/up another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.engine.kernels.elementwise import add_rms_norm, rms_norm, silu_mul
from flashdrive_node.engine.kernels.parts import is_parts
from flashdrive_node.engine.kernels.row_formats import LARGEST, QuantisedRows, Rotation, RowFormat, Unscaled


def quantise(x: Tensor, form: RowFormat) -> QuantisedRows:
    """Rows [M, K] of a 16-bit type as they are, into a product's format."""
    _check(x, form)
    if not uses_triton(x):
        return quantise_reference(x, form)
    if form.group_size is None:
        from flashdrive_node.engine.kernels.triton_round_rows import round_rows

        return round_rows(x, form)
    from flashdrive_node.engine.kernels.triton_rotate_quantise import round_groups, turn

    return round_groups(x if form.rotation is None else turn(x, form.rotation), form, x.dtype)


def norm_quantise(x: Tensor, weight: Tensor, eps: float, form: RowFormat) -> QuantisedRows:
    """Rows of `rms_norm`, rounded to x's type before they are scaled and turned."""
    _check(x, form)
    if not uses_triton(x) or form.group_size is not None:
        return quantise(rms_norm(x, weight, eps), form)
    from flashdrive_node.engine.kernels.triton_round_rows import norm_round

    return norm_round(x, None, weight, eps, form)[1]


def add_norm_quantise(
    x: Tensor, update: Tensor | Unscaled, weight: Tensor, eps: float, form: RowFormat
) -> tuple[Tensor, QuantisedRows]:
    """The sum and the rows of `add_rms_norm`; `update` may be in parts, or for a form without groups unscaled."""
    _check(x, form)
    if isinstance(update, Tensor) and (not uses_triton(x) or form.group_size is not None):
        total, normed = add_rms_norm(x, update, weight, eps)
        return total, quantise(normed, form)
    given = update.sums if isinstance(update, Unscaled) else update
    if given.shape[-2:] != x.shape or given.dtype != (torch.float32 if is_parts(given) else x.dtype):
        raise ValueError(
            f"quantise: x and update alike, or float32 parts of it, are required, found {list(x.shape)} {x.dtype} and "
            f"{list(given.shape)} {given.dtype}"
        )
    from flashdrive_node.engine.kernels.triton_round_rows import norm_round

    return norm_round(x, update, weight, eps, form)


def gate_quantise(gate_up: Tensor | Unscaled, form: RowFormat) -> QuantisedRows:
    """Rows of `silu_mul`: [M, 2 * K] with the gate in front -> [M, K]; unscaled for a form without groups."""
    if isinstance(gate_up, Unscaled):
        from flashdrive_node.engine.kernels.triton_round_rows import gate_round

        return gate_round(gate_up, form)
    _check(gate_up[:, : gate_up.shape[1] // 2], form)
    if not uses_triton(gate_up):
        return quantise_reference(silu_mul(gate_up), form)
    if form.group_size is None:
        from flashdrive_node.engine.kernels.triton_round_rows import gate_round

        return gate_round(gate_up, form)
    from flashdrive_node.engine.kernels.triton_rotate_quantise import round_groups, turn

    if form.rotation is None:
        return round_groups(silu_mul(gate_up), form, gate_up.dtype)
    return round_groups(turn(gate_up, form.rotation, gated=True), form, gate_up.dtype)


def quantise_reference(x: Tensor, form: RowFormat) -> QuantisedRows:
    """`quantise` by PyTorch, with the roundings of `paroquant.round_tokens` and `fp8.round_rows`."""
    turned = x.float() if form.rotation is None else turn_reference(x, form.rotation)
    values, scales = turned.to(form.dtype), None
    if form.dtype in LARGEST:
        largest = LARGEST[form.dtype]
        scales = turned.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * largest) / largest
        if form.scale is not None:
            scales = torch.full_like(scales, form.scale) + 0 * scales
        scales = scales.masked_fill(~scales.isfinite(), torch.nan)
        scaled = (turned / scales[:, None]).nan_to_num(0.0).clamp(-largest, largest)
        values = (scaled.round() if form.dtype == torch.int8 else scaled).to(form.dtype)
    if form.group_size is None:
        return QuantisedRows(values, scales, None, x.dtype)
    sums = values.float().unflatten(1, (-1, form.group_size)).sum(dim=2).T.contiguous()
    return QuantisedRows(values, scales, sums, x.dtype)


def turn_reference(x: Tensor, rotation: Rotation) -> Tensor:
    """Scaled and turned rows, float32 [M, K], by the steps of a kernel."""
    turned = (x.float() * rotation.channel_scales.float()).unflatten(1, (-1, rotation.group_size))
    steps = rotation.steps.unflatten(1, (-1, rotation.group_size)).long()
    turns = rotation.turns.unflatten(1, (steps.shape[1], -1, 2))
    for step, (cos, sin) in zip(steps, (turn.unbind(-1) for turn in turns), strict=False):
        first, second = turned.gather(2, step.expand_as(turned)).unflatten(2, (-1, 2)).unbind(-1)
        turned = torch.stack((cos * first + sin * second, cos * second - sin * first), dim=-1).flatten(2)
    return torch.empty_like(turned).scatter_(2, steps[-1].expand_as(turned), turned).flatten(1)


def _check(x: Tensor, form: RowFormat) -> None:
    if x.ndim != 2 or x.stride(1) != 1 or form.dtype not in (*LARGEST, x.dtype):
        raise ValueError(
            "quantise: rows [M, K] for values of int8, float8_e4m3fn or their own type are required, found "
            f"{list(x.shape)} {x.dtype} for {form.dtype}"
        )
    size, rotation = form.group_size, form.rotation
    if size is not None and (size & (size - 1) or x.shape[1] % size):
        raise ValueError(
            f"quantise: whole groups of a power of two are required, found {x.shape[1]} in groups of {size}"
        )
    if rotation is not None and (rotation.steps.shape[1] != x.shape[1] or rotation.group_size != size):
        raise ValueError(
            f"quantise: a rotation of {x.shape[1]} channels in groups of {size} is required, found one of "
            f"{rotation.steps.shape[1]} in groups of {rotation.group_size}"
        )
