"""Rows into 8-bit floats in Triton, behind the gate or the GELU of an MLP: a program holds a row in its registers.

A row is walked in stretches of a power of two, of which as many are taken as leave little of the last one idle: so
several rows find room on a multiprocessor, and one is read while another is written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.row_formats import LARGEST, QuantisedRows, RowFormat

#: What rows are made of.
_PLAIN, _GATE, _GELU = (tl.constexpr(n) for n in range(3))
#: Smallest scale: of a row of zeros.
_SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
#: Most stretches of a row.
_STRETCHES = 5


def round_rows(x: Tensor, form: RowFormat) -> QuantisedRows:
    """See `rotate_quantise.quantise`, of a form without groups."""
    return _run(_PLAIN, x, x.shape[1], form)


def gate_round(gate_up: Tensor, form: RowFormat) -> QuantisedRows:
    """See `rotate_quantise.gate_quantise`, of a form without groups."""
    return _run(_GATE, gate_up, gate_up.shape[1] // 2, form)


def gelu_round(x: Tensor, form: RowFormat) -> QuantisedRows:
    """See `vision.gelu_quantise`, of a form without groups."""
    return _run(_GELU, x, x.shape[1], form)


def stretches(size: int) -> tuple[int, int]:
    """Length and number of the stretches of a row: the fewest among those that leave least idle."""
    found = [(triton.next_power_of_2(triton.cdiv(size, n)), n) for n in range(1, _STRETCHES + 1)]
    return min(found, key=lambda pair: (pair[0] * pair[1], pair[1]))


def _run(source: tl.constexpr, x: Tensor, size: int, form: RowFormat) -> QuantisedRows:
    count, (stretch, number) = len(x), stretches(size)
    values = torch.empty(count, size, dtype=form.dtype, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    _round_rows[(count,)](
        x,
        values,
        scales,
        size,
        x.stride(0),
        form.scale or 0.0,
        SOURCE=source,
        LARGEST=LARGEST[form.dtype],
        FIXED=form.scale is not None,
        STRETCH=stretch,
        STRETCHES=number,
        num_warps=min(16, max(1, stretch // 512)),
        **options(x.device),
    )
    return QuantisedRows(values, scales, None, x.dtype)


@triton.jit
def _round_rows(
    x_ptr,
    values,
    scales,
    size,
    x_row,
    fixed,
    SOURCE: tl.constexpr,
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
    held = ()
    top = tl.zeros([STRETCH], tl.float32)
    spoiled = tl.zeros([STRETCH], tl.float32)
    for i in tl.static_range(STRETCHES):
        column = i * STRETCH + lane
        y = _made(x_ptr, column, column < size, size, SOURCE)
        top = tl.maximum(top, tl.abs(y))
        spoiled += y * 0.0  # maxima pass over nan: sums of zeros do not
        held = held + (y,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred tuples)
    lost = tl.sum(spoiled, 0)
    scale = (fixed if FIXED else tl.maximum(tl.max(top, 0) / LARGEST, _SMALLEST)) + lost
    tl.store(scales + row, scale)
    factor = 1.0 / scale
    for i in tl.static_range(STRETCHES):
        column = i * STRETCH + lane
        y = tl.where(lost == 0.0, held[i] * factor, 0.0)
        y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
        tl.store(values + column, y.to(values.dtype.element_ty), mask=column < size)


@triton.jit
def _made(x_ptr, column, within, size, SOURCE: tl.constexpr):
    """What is rounded, float32: values as they are, the gate of two, or the tanh form of GELU, behind its rounding."""
    dtype = x_ptr.dtype.element_ty
    y = tl.load(x_ptr + column, mask=within, other=0.0).to(tl.float32)
    if SOURCE == _GATE:
        up = tl.load(x_ptr + size + column, mask=within, other=0.0).to(tl.float32)
        y = gated(y, up, dtype).to(tl.float32)
    if SOURCE == _GELU:
        # y * (1 + tanh(z)) / 2 is y * sigmoid(2 z).
        z = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = (y * tl.sigmoid(2.0 * z)).to(dtype).to(tl.float32)
    return y


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded behind either, as in `silu_mul`."""
    return ((gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up).to(dtype)
