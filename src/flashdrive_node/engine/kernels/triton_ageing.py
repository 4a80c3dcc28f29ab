"""Ageing in Triton: one program per chain of moves and layer, which reads every place before it writes to it."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flashdrive_node.engine.kernels.ageing import Moves


def age(store: Tensor, keys: Tensor, values: Tensor, slots: Tensor, moves: Moves, cos: Tensor, sin: Tensor) -> None:
    """See `ageing.age`."""
    chains, steps = moves.chains.shape
    if not chains:
        return
    layers, heads, places, dim = store.shape
    _age[(chains, layers)](
        store,
        keys,
        values,
        slots,
        moves.source,
        moves.target,
        moves.chains,
        cos,
        sin,
        places,
        keys.shape[2],
        STEPS=steps,
        HEADS=heads,
        PADDED_HEADS=triton.next_power_of_2(heads),
        HALF=dim // 2,
        PADDED_HALF=triton.next_power_of_2(dim // 2),
        num_warps=4,
    )


@triton.jit
def _age(
    store,
    keys,
    values,
    slots,
    sources,
    targets,
    chains,
    cos,
    sin,
    places,
    cache_slots,
    STEPS: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    chain, layer = tl.program_id(0), tl.program_id(1)
    head = tl.arange(0, PADDED_HEADS)[:, None]
    column = tl.arange(0, PADDED_HALF)[None, :]
    row = (layer * HEADS + head).to(tl.int64)  # of the store and the cache, by layer and head
    for step in range(STEPS):
        move = tl.load(chains + chain * STEPS + step)
        there = move >= 0
        within = (head < HEADS) & (column < HALF) & there
        source = tl.load(sources + move, mask=there, other=0)
        target = tl.load(targets + move, mask=there, other=0)
        source_slot = tl.load(slots + source, mask=there, other=0)
        target_slot = tl.load(slots + target, mask=there, other=0)
        known = (column < HALF) & there
        angle = move * 2 * HALF + column
        cos_first = tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)
        cos_second = tl.load(cos + angle + HALF, mask=known, other=0.0).to(tl.float32)
        sin_first = tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)
        sin_second = tl.load(sin + angle + HALF, mask=known, other=0.0).to(tl.float32)

        old = store + (row * places + source) * 2 * HALF + column
        first, second = tl.load(old, mask=within, other=0.0), tl.load(old + HALF, mask=within, other=0.0)
        old_values = values + (row * cache_slots + source_slot) * 2 * HALF + column
        first_value = tl.load(old_values, mask=within, other=0.0)
        second_value = tl.load(old_values + HALF, mask=within, other=0.0)
        tl.debug_barrier()  # every thread has read

        new = store + (row * places + target) * 2 * HALF + column
        tl.store(new, first, mask=within)
        tl.store(new + HALF, second, mask=within)
        slot = (row * cache_slots + target_slot) * 2 * HALF + column
        tl.store(values + slot, first_value, mask=within)
        tl.store(values + slot + HALF, second_value, mask=within)
        # Rounded behind the product with the cosine and behind the sum, as by `rotate` on a GPU.
        a, b = first.to(tl.float32), second.to(tl.float32)
        straight = (a * cos_first).to(keys.dtype.element_ty).to(tl.float32)
        tl.store(keys + slot, (straight + b * sin_first).to(keys.dtype.element_ty), mask=within)
        straight = (b * cos_second).to(keys.dtype.element_ty).to(tl.float32)
        tl.store(keys + slot + HALF, (straight + a * sin_second).to(keys.dtype.element_ty), mask=within)
        tl.debug_barrier()  # and written, before the next step reads
