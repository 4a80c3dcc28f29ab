"""Nucleus sampling in Triton: the edge of the nucleus is found by halving, sixteenfold at a time, instead of sorting.

Logits of 16 bits are ordered like 16-bit integers, their keys. Of 16 keys in the interval where the edge must be, the
probability of everything up to each is summed; that narrows the interval to a seventeenth, and four times to one key.
Programs sum stretches of the vocabulary, and those of the next launch add up the sums, always in the same order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Logits per program.
BLOCK = 4096
#: Keys tried per pass, and passes that narrow 2^16 keys down to one.
TRIED, PASSES = 16, 4
_LOG2_E = 1.4426950408889634


def draw(logits: Tensor, temperature: float, top_p: float, noise: Tensor) -> Tensor:
    """See `sampling.draw`."""
    (rows, size), device = logits.shape, logits.device
    chunks = triton.cdiv(size, BLOCK)
    passes = 0 if top_p == 1 else PASSES
    # Per pass and chunk: largest logit, sum of exponentials relative to it, and sums up to each tried key.
    sums = torch.empty(passes + 1, rows, chunks, TRIED + 2, dtype=torch.float32, device=device)
    intervals = torch.empty(passes + 1, rows, 2, dtype=torch.int32, device=device)
    best = torch.empty(2, rows, chunks, dtype=torch.float32, device=device)
    best_index = best[1].view(torch.int32)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    shape = {
        "CHUNKS": chunks,
        "PADDED": triton.next_power_of_2(chunks),
        "BLOCK": BLOCK,
        "TRIED": TRIED,
    }
    rate = _LOG2_E / temperature
    for n in range(passes):
        last = max(n - 1, 0)
        _narrow[(rows, chunks)](
            logits, sums[last], intervals[last], sums[n], intervals[n], size, rate, 1 - top_p, FIRST=n == 0, **shape
        )
    last = max(passes - 1, 0)
    _race[(rows, chunks)](
        logits, noise, sums[last], intervals[last], best[0], best_index, size, rate, 1 - top_p, ALL=passes == 0, **shape
    )
    _finish[(rows,)](best[0], best_index, out, CHUNKS=chunks, PADDED=shape["PADDED"], num_warps=1)
    return out


@triton.jit
def _key(logits):
    """Integers in the order of the numbers."""
    bits = logits.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFF, bits)


@triton.jit
def _tried(low, high, index, TRIED: tl.constexpr):
    """A key in ``low .. high - 1``; together they cut the interval into even parts."""
    return low + (high - low) * (index + 1) // (TRIED + 1)


@triton.jit
def _narrowed(sums, intervals, row, rate, dropped, CHUNKS: tl.constexpr, PADDED: tl.constexpr, TRIED: tl.constexpr):
    """The interval after a pass: up to `low` is dropped, up to `high` is too much; and the row's largest logit."""
    chunk = tl.arange(0, PADDED)
    base = sums + (row * CHUNKS + chunk) * (TRIED + 2)
    top = tl.load(base, mask=chunk < CHUNKS, other=float("-inf"))
    largest = tl.max(top, 0)
    weight = tl.exp2((top - largest) * rate)
    total = tl.sum(tl.load(base + 1, mask=chunk < CHUNKS, other=0.0) * weight, 0)
    index = tl.arange(0, TRIED)
    part = tl.load(base[:, None] + 2 + index[None, :], mask=(chunk < CHUNKS)[:, None], other=0.0)
    upto = tl.sum(part * weight[:, None], 0)
    low, high = tl.load(intervals + row * 2), tl.load(intervals + row * 2 + 1)
    tried = _tried(low, high, index, TRIED)
    small = upto <= dropped * total
    low, high = tl.max(tl.where(small, tried, low), 0), tl.min(tl.where(small, high, tried), 0)
    return low, high, largest


@triton.jit
def _narrow(
    logits,
    last_sums,
    last_intervals,
    sums,
    intervals,
    size,
    rate,
    dropped,
    FIRST: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TRIED: tl.constexpr,
):
    """Sums of one stretch of the vocabulary for the next keys that are tried."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * size + column, mask=column < size, other=float("-inf"))
    if FIRST:
        low, high = -32769, 32767
    else:
        low, high, _ = _narrowed(last_sums, last_intervals, row, rate, dropped, CHUNKS, PADDED, TRIED)
    if chunk == 0:
        tl.store(intervals + row * 2, low)
        tl.store(intervals + row * 2 + 1, high)
    key = _key(x)
    number = x.to(tl.float32)
    top = tl.max(number, 0)
    weight = tl.exp2((number - tl.where(top == float("-inf"), 0.0, top)) * rate)
    target = sums + (row * CHUNKS + chunk) * (TRIED + 2)
    tl.store(target, top)
    tl.store(target + 1, tl.sum(weight, 0))
    for index in tl.static_range(TRIED):
        upto = tl.sum(tl.where(key <= _tried(low, high, index, TRIED), weight, 0.0), 0)
        tl.store(target + 2 + index, upto)


@triton.jit
def _race(
    logits,
    noise,
    sums,
    intervals,
    best,
    best_index,
    size,
    rate,
    dropped,
    ALL: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TRIED: tl.constexpr,
):
    """The winner of one stretch of the vocabulary: the largest of log p - log noise within the nucleus."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    place = row.to(tl.int64) * size + column
    x = tl.load(logits + place, mask=column < size, other=float("-inf"))
    number = x.to(tl.float32)
    score = number * rate - tl.log2(tl.load(noise + place, mask=column < size, other=1.0))
    if not ALL:
        _, edge, largest = _narrowed(sums, intervals, row, rate, dropped, CHUNKS, PADDED, TRIED)
        # The likeliest token is never dropped, however small top-p.
        score = tl.where((_key(x) >= edge) | (number == largest), score, float("-inf"))
    winner, index = tl.max(score, 0, return_indices=True)
    tl.store(best + row * CHUNKS + chunk, winner)
    tl.store(best_index + row * CHUNKS + chunk, chunk * BLOCK + index)


@triton.jit
def _finish(best, best_index, out, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    """The winner of a row."""
    row = tl.program_id(0)
    chunk = tl.arange(0, PADDED)
    _, winner = tl.max(
        tl.load(best + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf")), 0, return_indices=True
    )
    tl.store(out + row, tl.load(best_index + row * CHUNKS + winner).to(tl.int64))
