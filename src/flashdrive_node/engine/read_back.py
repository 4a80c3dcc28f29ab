"""Small results on their way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class ReadBack:
    """Brings a tensor to the host through page-locked memory, waiting for it alone and not for the whole device."""

    def __init__(self, like: Tensor):
        """`like` gives the type, shape and device of what will come."""
        self._on_gpu = like.is_cuda
        self._host = torch.empty(like.shape, dtype=like.dtype, pin_memory=self._on_gpu)
        self._done = torch.cuda.Event() if self._on_gpu else None

    def start(self, tensor: Tensor) -> None:
        """Begin behind what the device has been told to do so far."""
        self._host.copy_(tensor, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def wait(self) -> Tensor:
        """The tensor on the host; the next `start` overwrites it."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
