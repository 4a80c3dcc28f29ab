"""Kernels that begin before the one in front of them has ended, and fetch their weights meanwhile.

From compute capability 9.0 on, a kernel may let the next one be launched as soon as all of its own programs run
(programmatic dependent launch). The next one then waits where it first needs what earlier kernels wrote. Weights are
written by none, so a product can have the first columns of its weight brought into the L2 cache before it waits: the
memory goes on streaming while norms, rotations and attention, which are too small to occupy it, run.

What is waited for is the end of the kernel in front and everything that it waited for itself, so the order of all
reads and writes stays what it is without, in a stream and in a graph of it, as long as every kernel that is launched so
calls `follow` or `wait_for_writes` before it reads or writes memory that others write or read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are pointers and numbers of Triton's own types.

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

#: Of each row of a weight that a program multiplies, fetched ahead.
AHEAD_BYTES = 2048


@lru_cache(maxsize=16)
def launches_early(device: torch.device) -> bool:
    """Whether a device can."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, Any]:
    """How a kernel with the constant `EARLY` is launched on a device."""
    early = launches_early(device)
    # The interpreter on CPUs knows no such option.
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def ahead_bytes(weight: torch.Tensor) -> int:
    """What `fetch_ahead` may take of each row of a contiguous weight: nothing of rows that are not aligned."""
    row = weight.shape[-1] * weight.element_size()
    return AHEAD_BYTES if row % 16 == 0 and weight.data_ptr() % 16 == 0 else 0


@triton.jit
def follow(EARLY: tl.constexpr):
    """Let the next kernel be launched, and wait for what the earlier ones write."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_launch(EARLY: tl.constexpr):
    """The first half of `follow`."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_writes(EARLY: tl.constexpr):
    """The second half of `follow`."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_ahead(rows, count, EARLY: tl.constexpr, LARGEST: tl.constexpr):
    """Bring the first elements of some rows into the L2 cache.

    Args:
        rows: Pointers to the rows, each aligned to 16 bytes.
        count: Elements of each that will be read; a multiple of 16 bytes of them is fetched.
        EARLY: Nothing happens without.
        LARGEST: Bytes of each row at most, a multiple of 16; 0 fetches nothing.
    """
    if EARLY and LARGEST > 0:
        width: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
        size = tl.minimum(count * width // 16 * 16, LARGEST)
        sizes = tl.zeros(rows.shape, tl.int32) + size
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [rows.to(tl.uint64, bitcast=True), sizes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
