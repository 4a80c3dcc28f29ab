"""Which form of the kernels runs: Triton where it can, the PyTorch reference elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from flashdrive_node.model.errors import InputError

#: auto: Triton on CUDA devices of compute capability 8.0 and above. triton: always (on a CPU in its interpreter, which
#: the variable TRITON_INTERPRET=1 must have switched on before the import). reference: PyTorch everywhere.
Backend = Literal["auto", "triton", "reference"]

#: Environment variable with the backend of the process.
VARIABLE = "FLASHDRIVE_KERNELS"

#: Types that the Triton kernels take; others run in the reference.
DTYPES = (torch.bfloat16, torch.float16)

_forced: Backend | None = None


@contextmanager
def forced(backend: Backend) -> Iterator[None]:
    """Use a backend within a `with` block, whatever the environment says."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def uses_triton(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a kernel on `x` runs in Triton; `dtype` is the model's where x has another.

    Raises:
        InputError: The environment names no backend, or Triton is demanded and missing.
    """
    backend = _forced or environment()
    if backend == "reference" or (dtype or x.dtype) not in DTYPES:
        return False
    if backend == "triton":
        if not has_triton():
            raise InputError("kernels: the triton package is required by backend 'triton', found none")
        return True
    return x.is_cuda and has_triton() and _capable(x.device)


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether the triton package can be imported."""
    try:
        import triton.language  # noqa: F401
    except ImportError:
        return False
    return True


@lru_cache(maxsize=1)
def environment() -> Backend:
    """The backend that the environment names."""
    name = os.environ.get(VARIABLE, "auto")
    if name not in get_args(Backend):
        raise InputError(f"environment variable {VARIABLE} must be one of {list(get_args(Backend))}, found {name!r}")
    return name  # type: ignore[return-value]


@lru_cache(maxsize=16)
def _capable(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=16)
def has_fp8(device: torch.device) -> bool:
    """Whether kernels may use e4m3: compute capability 8.9 and later, and the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; that of an H100 and H200 for any other, so that tests run what they run."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
