"""Norm or gate, rotation and rounding of a row in one Triton program, which holds the row in its registers.

Rows are tiles [groups, channels of a group]. A round of the rotation brings every channel beside its partner and turns
the pairs; nothing is put back until the end, where values are stored at their own places. Sums within groups come along
for the zero points of 4-bit weights.

A round costs four shuffles per channel within a warp: by its instructions about 5 microseconds for a row of 4096 on one
multiprocessor, which has it to itself. For many rows and for long ones the matrix units rotate, with a matrix per
group, in a kernel of its own in front of the rounding.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.parts import is_parts
from flashdrive_node.engine.kernels.row_formats import LARGEST, QuantisedRows, Rotation, RowFormat
from flashdrive_node.engine.kernels.triton_round_rows import gated

#: What rows are made of; norms last.
_PLAIN, _GATE, _NORM, _ADD = (tl.constexpr(n) for n in range(4))
#: Smallest scale: of a row of zeros.
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
#: Added to a float32 of up to 2^22 and taken away again, it rounds to a whole number, halves to even ones.
_WHOLE = tl.constexpr(12582912.0)


def quantise(x: Tensor, form: RowFormat) -> QuantisedRows:
    """See `rotate_quantise.quantise`."""
    return _run(_PLAIN, x, x, x, x, 0.0, form)


def norm_quantise(x: Tensor, weight: Tensor, eps: float, form: RowFormat) -> QuantisedRows:
    """See `rotate_quantise.norm_quantise`."""
    return _run(_NORM, x, x, weight, x, eps, form)


def add_norm_quantise(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, form: RowFormat
) -> tuple[Tensor, QuantisedRows]:
    """See `rotate_quantise.add_norm_quantise`."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, _run(_ADD, x, update, weight, total, eps, form)


def gate_quantise(gate_up: Tensor, form: RowFormat) -> QuantisedRows:
    """See `rotate_quantise.gate_quantise`."""
    return _run(_GATE, gate_up, gate_up, gate_up, gate_up, 0.0, form)


def turn(x: Tensor, rotation: Rotation, gated: bool = False) -> Tensor:
    """Scaled and turned rows by matrices, float32 [M, K], off by about 2^-17 of a group's norm.

    Args:
        x: Rows [M, K], or in front of the gate [M, 2 * K].
        rotation: Of K channels.
        gated: The latter.
    """
    count, size, width = len(x), x.shape[1] // 2 if gated else x.shape[1], rotation.group_size
    block = 16 if count <= 16 else 64
    out = torch.empty(count, size, dtype=torch.float32, device=x.device)
    grid = (size // width, triton.cdiv(count, block))
    _turn[grid](
        x,
        rotation.blocks,
        out,
        count,
        size,
        x.stride(0),
        GATED=gated,
        TOKENS=block,
        WIDTH=width,
        num_warps=4,
        **options(x.device),
    )
    return out


def round_turned(turned: Tensor, form: RowFormat, dtype: torch.dtype) -> QuantisedRows:
    """Rows of `turn` into a product's format, for results of a type."""
    rows = _run(_PLAIN, turned, turned, turned, turned, 0.0, form, turned=True)
    return replace(rows, dtype=dtype)


def _run(
    source: tl.constexpr,
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    total: Tensor,
    eps: float,
    form: RowFormat,
    turned: bool = False,
) -> QuantisedRows:
    count, size, rotation = len(x), x.shape[1], form.rotation
    if source == _GATE:
        size //= 2
    width = form.group_size or triton.next_power_of_2(size)
    groups = triton.cdiv(size, width)
    values = torch.empty(count, size, dtype=form.dtype, device=x.device)
    floats = torch.empty((groups + 1) * count, dtype=torch.float32, device=x.device)
    scales, sums = floats[:count], floats[count:].view(groups, count)
    padded = triton.next_power_of_2(groups)
    _rotate_quantise[(count,)](
        x,
        update,
        weight,
        total,
        x if rotation is None else rotation.channel_scales,
        x if rotation is None else rotation.steps,
        floats if rotation is None else rotation.turns,
        values,
        scales,
        sums,
        count,
        size,
        x.stride(0),
        update.stride(-2),
        update.stride(0),
        eps,
        form.scale or 0.0,
        SOURCE=source,
        PARTS=len(update) if is_parts(update) else 1,
        ROUNDS=0 if rotation is None or turned else len(rotation.steps) - 1,
        GROUPED=form.group_size is not None,
        LARGEST=LARGEST.get(form.dtype, 0.0),
        FIXED=form.scale is not None,
        GROUPS=padded,
        WIDTH=width,
        num_warps=min(16, max(1, width // 256)) if rotation is None else min(32, max(1, padded * width // 128)),
        **options(x.device),
    )
    return QuantisedRows(
        values, scales if form.dtype in LARGEST else None, None if form.group_size is None else sums, x.dtype
    )


@triton.jit(do_not_specialize=["count"])
def _rotate_quantise(
    x,
    update,
    weight,
    total,
    channel_scales,
    steps,
    turns,
    values,
    scales,
    sums,
    count,
    size,
    x_row,
    update_row,
    update_part,
    eps,
    fixed,
    SOURCE: tl.constexpr,
    PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    GROUPED: tl.constexpr,
    LARGEST: tl.constexpr,
    FIXED: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, GROUPS)[:, None] * WIDTH
    place = first + tl.arange(0, WIDTH)[None, :]
    within = place < size
    column = place
    if ROUNDS > 0:
        column = first + tl.load(steps + place, mask=within, other=0).to(tl.int32)
    row_update, row_total = update + row * update_row, total + row * size
    y = _input(x + row * x_row, row_update, weight, row_total, column, within, size, update_part, eps, SOURCE, PARTS)
    if ROUNDS > 0:
        y *= tl.load(channel_scales + column, mask=within, other=0.0).to(tl.float32)
        y = _turned(y, steps, turns, place, within, size, ROUNDS, GROUPS, WIDTH)
        column = first + tl.load(steps + ROUNDS * size + place, mask=within, other=0).to(tl.int32)
    if LARGEST > 0.0:
        y, scale = scaled(y, fixed, LARGEST, FIXED, values.dtype.element_ty == tl.int8)
        tl.store(scales + row, scale)
    rounded = y.to(values.dtype.element_ty)
    tl.store(values + row * size + column, rounded, mask=within)
    if GROUPED:
        group = tl.arange(0, GROUPS)
        tl.store(sums + group * count + row, tl.sum(rounded.to(tl.float32), 1), mask=group * WIDTH < size)


@triton.jit
def _input(x, update, weight, total, column, within, size, update_part, eps, SOURCE: tl.constexpr, PARTS: tl.constexpr):
    """A row at some columns, float32: as it is, behind a norm, a sum and a norm, or the gate."""
    dtype = x.dtype.element_ty
    y = tl.load(x + column, mask=within, other=0.0).to(tl.float32)
    if SOURCE == _GATE:
        up = tl.load(x + size + column, mask=within, other=0.0).to(tl.float32)
        y = gated(y, up, dtype).to(tl.float32)
    if SOURCE == _ADD:
        added = tl.load(update + column, mask=within, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            added += tl.load(update + part * update_part + column, mask=within, other=0.0)
        rounded = (y + added.to(dtype).to(tl.float32)).to(dtype)
        tl.store(total + column, rounded, mask=within)
        y = rounded.to(tl.float32)
    if SOURCE >= _NORM:
        mean = tl.sum(tl.sum(y * y, 1), 0) / size
        y = y * tl.rsqrt(mean + eps) * tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
        y = y.to(dtype).to(tl.float32)
    return y


@triton.jit
def _turned(y, steps, turns, place, within, size, ROUNDS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """All rounds of a rotation, from the order of the first to that of the last."""
    for number in tl.static_range(ROUNDS):
        if number > 0:
            y = tl.gather(y, tl.load(steps + number * size + place, mask=within, other=0).to(tl.int32), 1)
        # Cosine and sine of a pair stand side by side, as the pair does.
        turn = tl.load(turns + number * size + place, mask=within, other=0.0)
        cos, sin = tl.split(tl.reshape(turn, [GROUPS, WIDTH // 2, 2]))
        one, other = tl.split(tl.reshape(y, [GROUPS, WIDTH // 2, 2]))
        y = tl.reshape(tl.join(cos * one + sin * other, cos * other - sin * one), [GROUPS, WIDTH])
    return y


@triton.jit
def scaled(y, fixed, LARGEST: tl.constexpr, FIXED: tl.constexpr, WHOLE: tl.constexpr):
    """A row within -LARGEST to LARGEST, in whole numbers or any, and its scale."""
    # Maxima pass over nan: a sum of zeros does not.
    spoiled = tl.sum(tl.sum(y * 0.0, 1), 0)
    if FIXED:
        scale = fixed + spoiled
    else:
        scale = tl.maximum(tl.max(tl.max(tl.abs(y), 1), 0) / LARGEST, _SMALLEST) + spoiled
    y = tl.where(spoiled == 0.0, tl.div_rn(y, scale), 0.0)
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    if WHOLE:
        y = (y + _WHOLE) - _WHOLE
    return y, scale


@triton.jit(do_not_specialize=["count"])
def _turn(
    x,
    blocks,
    out,
    count,
    size,
    x_row,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One group of some rows times the group's matrix, which comes as a sum of two."""
    follow(EARLY)
    group = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, WIDTH)
    column = (group * WIDTH + lane)[None, :]
    row = x + tl.minimum(token, count - 1).to(tl.int64)[:, None] * x_row
    rows = tl.load(row + column)
    if GATED:
        rows = gated(rows.to(tl.float32), tl.load(row + size + column).to(tl.float32), rows.dtype)
    place = blocks + (group * WIDTH + lane)[:, None] * WIDTH + lane[None, :]
    acc = tl.dot(rows, tl.load(place).to(rows.dtype))
    acc = tl.dot(rows, tl.load(place + size * WIDTH).to(rows.dtype), acc)
    tl.store(out + token.to(tl.int64)[:, None] * size + column, acc, mask=(token < count)[:, None])
