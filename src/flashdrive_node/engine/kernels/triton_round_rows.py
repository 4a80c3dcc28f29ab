"""Rows into 8-bit floats in Triton: as they are, or behind a norm, the gate or the GELU of an MLP.

A program holds its row in registers, so that the largest value is known before any is rounded. Long rows are walked in
stretches of a power of two, of which as many are taken as leave little of the last one idle: so several rows find room
on a multiprocessor, and one is read while another is written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.parts import is_parts
from flashdrive_node.engine.kernels.row_formats import LARGEST, QuantisedRows, RowFormat, Unscaled

#: What rows are made of.
_PLAIN, _GATE, _GELU = (tl.constexpr(n) for n in range(3))
#: Smallest scale: of a row of zeros.
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
#: Steps of a second term in one of the first, of whose rounding it is up to the half: as many as int8 has.
SECOND_TERM = tl.constexpr(254.0)
#: Added to a float32 of up to 2^22 and taken away again, it rounds to a whole number, halves to even ones.
WHOLE = tl.constexpr(12582912.0)
#: Most stretches of a row.
_STRETCHES = 5


def round_rows(x: Tensor, form: RowFormat) -> QuantisedRows:
    """See `rotate_quantise.quantise`, of a form without groups."""
    return _run(_PLAIN, x, x.shape[1], form)


def gate_round(gate_up: Tensor | Unscaled, form: RowFormat) -> QuantisedRows:
    """See `rotate_quantise.gate_quantise`, of a form without groups."""
    if isinstance(gate_up, Unscaled):
        return _run(_GATE, gate_up.sums, gate_up.sums.shape[1] // 2, form, gate_up)
    return _run(_GATE, gate_up, gate_up.shape[1] // 2, form)


def gelu_round(x: Tensor, form: RowFormat) -> QuantisedRows:
    """See `vision.gelu_mlp`, of a form without groups."""
    return _run(_GELU, x, x.shape[1], form)


def round_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [M, K] as ``scale * (first + second / SECOND_TERM)``: int8 [2, M, K], and float32 [M]."""
    count, size = x.shape
    values = torch.empty(2, count, size, dtype=torch.int8, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(size)
    warps = min(16, max(1, padded // 256))
    _round_twice[(count,)](
        x, values, scales, size, count * size, x.stride(0), PADDED=padded, num_warps=warps, **options(x.device)
    )
    return values, scales


def norm_round(
    x: Tensor, update: Tensor | Unscaled | None, weight: Tensor, eps: float, form: RowFormat
) -> tuple[Tensor, QuantisedRows]:
    """The sum where there is an update, maybe in parts or unscaled, else x, and its norm in a form without groups."""
    (count, size), unscaled = x.shape, update if isinstance(update, Unscaled) else None
    given = x if update is None else update.sums if isinstance(update, Unscaled) else update
    total = x if update is None else torch.empty(count, size, dtype=x.dtype, device=x.device)
    values = torch.empty(count, size, dtype=form.dtype, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(size)
    _norm_round[(count,)](
        x,
        given,
        scales if unscaled is None else unscaled.token_scales,
        scales if unscaled is None else unscaled.row_scales,
        weight,
        total,
        values,
        scales,
        size,
        x.stride(0),
        given.stride(-2),
        given.stride(0),
        eps,
        form.scale or 0.0,
        ADD=update is not None,
        PARTS=len(given) if is_parts(given) else 1,
        UNSCALED=unscaled is not None,
        LARGEST=LARGEST[form.dtype],
        FIXED=form.scale is not None,
        PADDED=padded,
        num_warps=min(16, max(1, padded // 256)),
        **options(x.device),
    )
    return total, QuantisedRows(values, scales, None, x.dtype)


def stretches(size: int) -> tuple[int, int]:
    """Length and number of the stretches of a row: the fewest among those that leave least idle."""
    found = [(triton.next_power_of_2(triton.cdiv(size, n)), n) for n in range(1, _STRETCHES + 1)]
    return min(found, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _run(
    source: tl.constexpr, x: Tensor, size: int, form: RowFormat, unscaled: Unscaled | None = None
) -> QuantisedRows:
    count, (stretch, number) = len(x), stretches(size)
    values = torch.empty(count, size, dtype=form.dtype, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    _round_rows[(count,)](
        x,
        scales if unscaled is None else unscaled.token_scales,
        scales if unscaled is None else unscaled.row_scales,
        values,
        scales,
        size,
        x.stride(0),
        form.scale or 0.0,
        SOURCE=source,
        UNSCALED=unscaled is not None,
        LARGEST=LARGEST[form.dtype],
        FIXED=form.scale is not None,
        STRETCH=stretch,
        STRETCHES=number,
        num_warps=min(16, max(1, stretch // 256)),
        **options(x.device),
    )
    return QuantisedRows(values, scales, None, x.dtype)


@triton.jit
def _round_rows(
    x_ptr,
    token_scales,
    row_scales,
    values,
    scales,
    size,
    x_row,
    fixed,
    SOURCE: tl.constexpr,
    UNSCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    FIXED: tl.constexpr,
    STRETCH: tl.constexpr,
    STRETCHES: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, STRETCH)
    x_ptr += row * x_row
    values += row * size
    factor = tl.load(token_scales + row) if UNSCALED else 1.0
    held = ()
    top = tl.zeros([STRETCH], tl.float32)
    spoiled = tl.zeros([STRETCH], tl.float32)
    for i in tl.static_range(STRETCHES):
        column = i * STRETCH + lane
        y = _made(x_ptr, column, column < size, size, factor, row_scales, SOURCE, UNSCALED)
        top = tl.maximum(top, tl.abs(y))
        spoiled += y * 0.0
        held = held + (y,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred tuples)
    scale = row_scale(top, spoiled, fixed, LARGEST, FIXED)
    tl.store(scales + row, scale)
    for i in tl.static_range(STRETCHES):
        column = i * STRETCH + lane
        tl.store(values + column, within(held[i], scale, LARGEST).to(values.dtype.element_ty), mask=column < size)


@triton.jit
def _made(x_ptr, column, known, size, factor, row_scales, SOURCE: tl.constexpr, UNSCALED: tl.constexpr):
    """What is rounded, float32: values as they are, the gate of two, or the tanh form of GELU, behind its rounding."""
    dtype = x_ptr.dtype.element_ty
    y = _product(x_ptr, column, known, factor, row_scales, UNSCALED)
    if SOURCE == _GATE:
        up = _product(x_ptr, size + column, known, factor, row_scales, UNSCALED)
        y = ((y * tl.sigmoid(y)).to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)
    if SOURCE == _GELU:
        # y * (1 + tanh(z)) / 2 is y * sigmoid(2 z).
        z = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = (y * tl.sigmoid(2.0 * z)).to(dtype).to(tl.float32)
    return y


@triton.jit
def _product(x_ptr, column, known, factor, row_scales, UNSCALED: tl.constexpr):
    """Values at some columns, float32, rounded to their type behind the scales where these are still missing."""
    y = tl.load(x_ptr + column, mask=known, other=0.0).to(tl.float32)
    if UNSCALED:
        y = y * factor * tl.load(row_scales + column, mask=known, other=0.0)
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def _norm_round(
    x_ptr,
    update_ptr,
    token_scales,
    row_scales,
    weight_ptr,
    total_ptr,
    values,
    scales,
    size,
    x_row,
    update_row,
    update_part,
    eps,
    fixed,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    UNSCALED: tl.constexpr,
    LARGEST: tl.constexpr,
    FIXED: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """RMS norm, rounded to x's type before it is rounded further, as in `triton_elementwise`."""
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    known = column < size
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_row + column, mask=known, other=0.0).to(tl.float32)
    if ADD:
        update = tl.load(update_ptr + row * update_row + column, mask=known, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            update += tl.load(update_ptr + part * update_part + row * update_row + column, mask=known, other=0.0)
        if UNSCALED:
            update *= tl.load(token_scales + row) * tl.load(row_scales + column, mask=known, other=0.0)
        rounded = (x + update.to(dtype).to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * size + column, rounded, mask=known)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=known, other=0.0).to(tl.float32)
    y = (x * tl.rsqrt(tl.sum(x * x, 0) / size + eps) * weight).to(dtype).to(tl.float32)
    scale = row_scale(tl.abs(y), y * 0.0, fixed, LARGEST, FIXED)
    tl.store(scales + row, scale)
    tl.store(values + row * size + column, within(y, scale, LARGEST).to(values.dtype.element_ty), mask=known)


@triton.jit
def _round_twice(x_ptr, values, scales, size, second, x_row, PADDED: tl.constexpr, EARLY: tl.constexpr):
    follow(EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    known = column < size
    y = tl.load(x_ptr + row * x_row + column, mask=known, other=0.0).to(tl.float32)
    scale = row_scale(tl.abs(y), y * 0.0, 0.0, 127.0, False)
    tl.store(scales + row, scale)
    y = within(y, scale, 127.0)
    first = (y + WHOLE) - WHOLE
    rest = ((y - first) * SECOND_TERM + WHOLE) - WHOLE
    tl.store(values + row * size + column, first.to(tl.int8), mask=known)
    tl.store(values + second + row * size + column, rest.to(tl.int8), mask=known)


@triton.jit
def row_scale(top, spoiled, fixed, LARGEST: tl.constexpr, FIXED: tl.constexpr):
    """The scale of a row of sizes; nan where a value was none, by a sum of zeros, since maxima pass over nan."""
    largest, lost = tl.reduce((top, spoiled), 0, _largest_and_sum)
    return (fixed if FIXED else tl.maximum(largest / LARGEST, SMALLEST)) + lost


@triton.jit
def within(y, scale, LARGEST: tl.constexpr):
    """Values by their scale, cut off at the format's range; zeros where the scale is no number."""
    y = tl.where(scale == scale, y * (1.0 / scale), 0.0)
    return tl.minimum(tl.maximum(y, -LARGEST), LARGEST)


@triton.jit
def _largest_and_sum(largest, total, other_largest, other_total):
    return tl.maximum(largest, other_largest), total + other_total
