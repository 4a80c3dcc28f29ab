"""The projections around the action expert in Triton: few rows, small float32 matrices, one kernel per layer.

The norm in front of a layer is part of it: its scale of a row comes out of the same walk over the row as the product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.triton_vision import layer_norm
from flashdrive_node.model.decoder import RMSNorm
from flashdrive_node.model.expert import ActionInProj

#: Rows and outputs of a tile, and columns per step.
_ROWS, _COLUMNS, _BLOCK = 16, 32, 64


def embed_waypoints(x: Tensor, time_part: Tensor, projection: ActionInProj, dtype: torch.dtype) -> Tensor:
    """See `waypoints.embed_waypoints`."""
    first, *others = (cast(nn.Linear, layer) for layer in projection.linears)
    count, channels = x.shape
    y = torch.empty(count, len(first.weight), device=x.device)
    _features[_grid(y)](
        x,
        projection.frequencies,
        first.weight,
        time_part,
        y,
        count,
        y.shape[1],
        first.weight.stride(0),
        CHANNELS=channels,
        FREQUENCIES=projection.frequencies.shape[1],
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
        **options(x.device),
    )
    for norm, layer in zip((cast(RMSNorm, norm) for norm in projection.norms), others, strict=True):
        out = torch.empty(count, len(layer.weight), device=x.device)
        _normed_linear[_grid(out)](
            y,
            norm.weight,
            layer.weight,
            layer.bias,
            out,
            count,
            y.shape[1],
            out.shape[1],
            norm.eps,
            ACTIVATE=layer is not others[-1],
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            BLOCK=_BLOCK,
            num_warps=4,
            **options(x.device),
        )
        y = out
    last = projection.out_norm
    return layer_norm(y, last.weight, last.bias, last.eps, dtype)


def project_velocity(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `waypoints.project_velocity`."""
    (count, size), channels = hidden.shape, len(weight)
    out = torch.empty(count, channels, device=hidden.device)
    _velocity[(count,)](
        hidden,
        weight,
        bias,
        out,
        size,
        hidden.stride(0),
        CHANNELS=channels,
        PADDED=triton.next_power_of_2(size),
        num_warps=4,
        **options(hidden.device),
    )
    return out


def _grid(out: Tensor) -> tuple[int, int]:
    return triton.cdiv(out.shape[1], _COLUMNS), triton.cdiv(out.shape[0], _ROWS)


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit(do_not_specialize=["count"])
def _features(
    x_ptr,
    frequencies,
    weight,
    time_part,
    out,
    count,
    out_size,
    weight_row,
    CHANNELS: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Fourier features of the actions through the first layer; those of the time are in `time_part` already."""
    follow(EARLY)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there, within = row < count, column < out_size
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for channel in tl.static_range(CHANNELS):
        x = tl.load(x_ptr + row * CHANNELS + channel, mask=there, other=0.0)
        own = weight + column * weight_row + channel * 2 * FREQUENCIES
        for i in range(FREQUENCIES):
            angle = x * tl.load(frequencies + channel * FREQUENCIES + i) * 2 * 3.141592653589793
            acc += tl.sin(angle)[:, None] * tl.load(own + i, mask=within, other=0.0)[None, :]
            acc += tl.cos(angle)[:, None] * tl.load(own + FREQUENCIES + i, mask=within, other=0.0)[None, :]
    y = _silu(acc * 1.4142135623730951 + tl.load(time_part + column, mask=within, other=0.0)[None, :])
    tl.store(out + row[:, None] * out_size + column[None, :], y, mask=there[:, None] & within[None, :])


@triton.jit(do_not_specialize=["count"])
def _normed_linear(
    x_ptr,
    scale,
    weight,
    bias,
    out,
    count,
    size,
    out_size,
    eps,
    ACTIVATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A layer behind a root-mean-square norm: the row's factor is a number, so it may come behind the product."""
    follow(EARLY)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there, within = row < count, column < out_size
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for at in range(0, size, BLOCK):
        lane = at + tl.arange(0, BLOCK)
        known = lane < size
        x = tl.load(x_ptr + row[:, None] * size + lane[None, :], mask=there[:, None] & known[None, :], other=0.0)
        w = tl.load(weight + column[None, :] * size + lane[:, None], mask=known[:, None] & within[None, :], other=0.0)
        squares += tl.sum(x * x, 1)
        scaled = x * tl.load(scale + lane, mask=known, other=0.0)[None, :]
        # Three products of shortened numbers, which together are as good as one of float32.
        acc = tl.dot(scaled, w, acc, input_precision="tf32x3")
    y = acc * tl.rsqrt(squares / size + eps)[:, None] + tl.load(bias + column, mask=within, other=0.0)[None, :]
    if ACTIVATE:
        y = _silu(y)
    tl.store(out + row[:, None] * out_size + column[None, :], y, mask=there[:, None] & within[None, :])


@triton.jit
def _velocity(
    hidden, weight, bias, out, size, hidden_row, CHANNELS: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr
):
    follow(EARLY)
    row = tl.program_id(0)
    column = tl.arange(0, PADDED)
    within = column < size
    h = tl.load(hidden + row * hidden_row + column, mask=within, other=0.0).to(tl.float32)
    for channel in tl.static_range(CHANNELS):
        w = tl.load(weight + channel * size + column, mask=within, other=0.0)
        tl.store(out + row * CHANNELS + channel, tl.sum(h * w, 0) + tl.load(bias + channel))
