"""Kernels that begin before the one in front of them has ended.

From compute capability 9.0 on, a kernel may let the next one be launched as soon as all of its own programs run
(programmatic dependent launch). The next one then waits where it first needs what earlier kernels wrote, its launch and
its first instructions behind it already. Norms, rotations, gates and attention let what follows begin so. Products with
weights do not: they fill the device, and programs that come early would hold their processors.

What is waited for is the end of the kernel in front and everything that it waited for itself, so the order of all
reads and writes stays what it is without, in a stream and in a graph of it, as long as every kernel that is launched so
calls `follow` or `wait_for_writes` before it reads or writes memory that others write or read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# The device functions' arguments are numbers of Triton's own types.

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@lru_cache(maxsize=16)
def launches_early(device: torch.device) -> bool:
    """Whether a device can."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def options(device: torch.device) -> dict[str, Any]:
    """How a kernel with the constant `EARLY` is launched on a device."""
    # The interpreter on CPUs knows no such option.
    return {"EARLY": True, "launch_pdl": True} if launches_early(device) else {"EARLY": False}


@triton.jit
def follow(EARLY: tl.constexpr):
    """Let the next kernel be launched, and wait for what the earlier ones write."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait_for_writes(EARLY: tl.constexpr):
    """Only wait."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
