"""Programmatic dependent launch: a kernel's programs take their places while the kernel in front of it still runs.

In a graph of hundreds of kernels of a few microseconds each, what lies between two of them counts. A kernel that is
launched so must wait before it touches anything that the one in front of it reads or writes; that one has waited
likewise, so everything further in front is done as well. PyTorch's own kernels in between change nothing: they begin
when all in front is done.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: Off until it is measured.
ENABLED = False


@lru_cache(maxsize=16)
def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options for kernels that call `wait_for_previous`; Hopper and newer devices can."""
    if ENABLED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernel in front is done and its results can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def invite_next(OVERLAP: tl.constexpr):
    """Let the next kernel's programs come, once every program of this one is as far.

    Called near a program's end: those that come earlier crowd on the processors that are free first, and stay there.
    """
    if OVERLAP:
        gdc_launch_dependents()


#: Bytes of a weight that are worth fetching in advance: what a device reads while it changes from kernel to kernel.
_FETCHED = 12 * 2**20


def fetched_columns(weight: Tensor | None) -> int:
    """Columns of a weight [N, K] that `fetch_columns` brings into the cache, a power of two; 0 where it cannot."""
    if weight is None or weight.shape[1] % 64 or weight.stride(1) != 1 or not weight.is_cuda:
        return 0
    columns = max(_FETCHED // (len(weight) * weight.element_size()), 64)
    return min(1 << columns.bit_length() - 1, 1 << weight.shape[1].bit_length() - 1)


@triton.jit
def fetch_columns(weight, rows, row_stride, program, programs, COLUMNS: tl.constexpr):
    """Bring the first columns of a weight, of numbers of 2 bytes, into the L2 cache; every program some rows."""
    row, line = tl.arange(0, 32)[:, None], tl.arange(0, COLUMNS // 64)[None, :] * 64
    for first in range(program * 32, rows, programs * 32):
        prefetch(weight + tl.minimum(first + row, rows - 1).to(tl.int64) * row_stride + line)


@triton.jit
def prefetch(pointers):
    """Fetch the 128-byte lines at these addresses into the L2 cache; addresses must lie within an allocation."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.uint64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
