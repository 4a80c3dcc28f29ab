"""Products with 4-bit weights in Triton: codes are streamed once, unpacked in registers, and never put into memory.

The weight is the tall operand, as in `triton_linear`. Every step takes one group of columns of some rows: one stretch
of memory (`PackedInt4`). Codes go into the matrix units as they are; scale and zero point act on the sums of a group:
``scale * (sum of code * x - zero * sum of x)``, of which the second sum came with x.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.backend import multiprocessors
from flashdrive_node.engine.kernels.early_launch import follow, options
from flashdrive_node.engine.kernels.row_formats import QuantisedRows
from flashdrive_node.engine.kernels.triton_linear import Tiling
from flashdrive_node.model.int4 import PackedInt4

_TO_FLOATS = (
    "{ .reg .b32 a, b, one, less; SHIFT and.b32 a, a, 0x0F0F0F0F; mov.b32 one, ONE; mov.b32 less, LESS; "
    "prmt.b32 b, a, TOP, 0x4140; prmt.b32 a, a, TOP, 0x4342; "
    "fma.rn.TYPE $0, b, one, less; fma.rn.TYPE $1, a, one, less; }"
)


def _program(text: str, **names: str) -> tl.constexpr:
    for name, value in names.items():
        text = text.replace(name, value)
    return tl.constexpr(text)


# Four bytes to four numbers. Where a code is the last byte of a 16-bit float whose first byte is that of 128 (bfloat16)
# or 1024 (float16), it counts ones.
_FIRST, _SECOND = "mov.b32 a, $2;", "shr.b32 a, $2, 4;"
_BF16 = {"TYPE": "bf16x2", "TOP": "0x43434343", "ONE": "0x3F803F80", "LESS": "0xC300C300"}
_FP16 = {"TYPE": "f16x2", "TOP": "0x64646464", "ONE": "0x3C003C00", "LESS": "0xE400E400"}
_HIGH_INTEGERS = tl.constexpr("{ .reg .b32 a; shr.b32 a, $1, 4; and.b32 $0, a, 0x0F0F0F0F; }")
_LOW_BF16, _HIGH_BF16 = _program(_TO_FLOATS, SHIFT=_FIRST, **_BF16), _program(_TO_FLOATS, SHIFT=_SECOND, **_BF16)
_LOW_FP16, _HIGH_FP16 = _program(_TO_FLOATS, SHIFT=_FIRST, **_FP16), _program(_TO_FLOATS, SHIFT=_SECOND, **_FP16)

#: Rows of x from which they are tiled too.
_MANY = 65


def tiling(count: int, groups: int, out_size: int, processors: int) -> Tiling:
    """A tiling for `count` rows of x, found by measuring on an H200; `block` is the number of these rows per tile."""
    if count >= _MANY:
        return Tiling(128, block=64, splits=1, warps=4, stages=4)
    # Three programs find room on a processor at once.
    room = 3 * processors // triton.cdiv(out_size, 64)
    splits = min(4, max(2, 1 << max(0, room.bit_length() - 1)), triton.cdiv(groups, 4))
    return Tiling(64, block=max(16, triton.next_power_of_2(count)), splits=splits, warps=4, stages=4)


def int4_parts(rows: QuantisedRows, weight: PackedInt4, chosen: Tiling | None = None) -> Tensor:
    """Product with a 4-bit weight; `chosen` replaces the tiling, for measurements.

    Args:
        rows: M rows with sums of their groups: whole numbers with a scale per row, or 16-bit floats.
        weight: [N, K] in groups of 64, 128 or 256.
        chosen: See above.

    Returns:
        [M, N] in the rows' type, or float32 parts of it (see `parts`).
    """
    if rows.sums is None or rows.sums.shape != (len(weight.codes), len(rows)):
        found = None if rows.sums is None else list(rows.sums.shape)
        raise ValueError(f"int4: sums [{len(weight.codes)}, {len(rows)}] of the groups are required, found {found}")
    values, device = rows.values, rows.values.device
    count, (out_size, _), groups = len(values), weight.shape, len(weight.codes)
    t = chosen or tiling(count, groups, out_size, multiprocessors(device))
    shape = (count, out_size) if t.splits == 1 else (t.splits, count, out_size)
    out = torch.empty(shape, dtype=rows.dtype if t.splits == 1 else torch.float32, device=device)
    # Tiles of x come first, so that those of one stretch of the weight run together and it is read once.
    grid = (triton.cdiv(count, t.block), triton.cdiv(out_size, t.rows), t.splits)
    _int4_linear[grid](
        values,
        rows.sums if rows.scales is None else rows.scales,
        rows.sums,
        *weight,
        out,
        count,
        out_size,
        groups,
        SCALED=rows.scales is not None,
        ASSEMBLY=values.is_cuda,
        TOKENS=t.block,
        ROWS=t.rows,
        HALF=weight.group_size // 2,
        SPLITS=t.splits,
        STAGES=t.stages,
        num_warps=t.warps,
        **options(device),
    )
    return out


@triton.jit(do_not_specialize=["count"])
def _int4_linear(
    values,
    token_scales,
    sums,
    codes,
    scales,
    zeros,
    out,
    count,
    out_size,
    groups,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    lane = tl.arange(0, HALF)
    share = tl.cdiv(groups, SPLITS)
    # What lies behind the end repeats the last instead of being masked: its sums are not stored.
    known_row = tl.minimum(row, out_size - 1).to(tl.int64)
    known_token = tl.minimum(token, count - 1).to(tl.int64)
    size = groups * (2 * HALF)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for group in tl.range(split * share, tl.minimum(split * share + share, groups), num_stages=STAGES):
        first = group * out_size
        packed = tl.load(codes + (first + known_row)[:, None] * HALF + lane[None, :])
        place = values + known_token[None, :] * size + (group * (2 * HALF) + lane)[:, None]
        low, high = tl.load(place), tl.load(place + HALF)
        part = _group_sums(packed, low, high, ASSEMBLY)
        scale = tl.load(scales + first + known_row).to(tl.float32)
        zero = tl.load(zeros + first + known_row).to(tl.float32)
        total = tl.load(sums + group * count + known_token)
        acc += (part - zero[:, None] * total[None, :]) * scale[:, None]
    if SCALED:
        acc *= tl.load(token_scales + known_token)[None, :]
    place = (split * count + token).to(tl.int64)[None, :] * out_size + row[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(row < out_size)[:, None] & (token < count)[None, :])


@triton.jit
def _group_sums(packed, low, high, ASSEMBLY: tl.constexpr):
    """Sums of code times x over a group, float32 [rows, tokens]; exact for integers."""
    if low.dtype == tl.int8:
        part = tl.dot(_integers(packed, False, ASSEMBLY), low, out_dtype=tl.int32)
        part = tl.dot(_integers(packed, True, ASSEMBLY), high, part, out_dtype=tl.int32).to(tl.float32)
    else:
        part = tl.dot(_floats(packed, False, low.dtype, ASSEMBLY), low)
        part = tl.dot(_floats(packed, True, low.dtype, ASSEMBLY), high, part)
    return part


@triton.jit
def _integers(packed, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Low or high halves of bytes as int8; four at a time, which the compiler does not see for the high ones."""
    if HIGH and ASSEMBLY:
        codes = tl.inline_asm_elementwise(_HIGH_INTEGERS, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    elif HIGH:
        codes = (packed >> 4).to(tl.int8)
    else:
        codes = (packed & 15).to(tl.int8)
    return codes


@triton.jit
def _floats(packed, HIGH: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Low or high halves of bytes as 16-bit floats: put behind the first byte of 128 or 1024, which is taken away."""
    if ASSEMBLY and dtype == tl.bfloat16:
        to_bf16: tl.constexpr = _HIGH_BF16 if HIGH else _LOW_BF16
        codes = tl.inline_asm_elementwise(to_bf16, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif ASSEMBLY:
        to_fp16: tl.constexpr = _HIGH_FP16 if HIGH else _LOW_FP16
        codes = tl.inline_asm_elementwise(to_fp16, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
    elif HIGH:
        codes = (packed >> 4).to(dtype)
    else:
        codes = (packed & 15).to(dtype)
    return codes
