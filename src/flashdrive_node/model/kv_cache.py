"""Static key/value cache of one context, shared by the language model and the action expert.

Keys are stored after q/k-norm and rotation, so that reading them is free of work. Slots are filled from the front and
`used` says how many hold something; attention reads a prefix slice and never sees a slot beyond it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.model.config import DecoderConfig


class KVCache:
    """Keys and values of every layer: two tensors [layers, kv_heads, slots, head_dim]."""

    def __init__(self, config: DecoderConfig, slots: int, device: torch.device | str, dtype: torch.dtype):
        shape = (config.num_layers, config.num_kv_heads, slots, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.used = 0

    @property
    def slots(self) -> int:
        """Slots allocated."""
        return self.keys.shape[2]

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put T new tokens into the slots from `start` on and give back everything up to their end.

        Args:
            layer: Layer index.
            start: First slot to fill.
            keys, values: [T, kv_heads, head_dim].

        Returns:
            Views [kv_heads, start + T, head_dim] of keys and values.
        """
        end = start + keys.shape[0]
        self.keys[layer, :, start:end].copy_(keys.transpose(0, 1))
        self.values[layer, :, start:end].copy_(values.transpose(0, 1))
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Start as a copy of the first `length` slots of another cache."""
        self.keys[:, :, :length].copy_(other.keys[:, :, :length])
        self.values[:, :, :length].copy_(other.values[:, :, :length])
        self.used = length

    def require(self, slots: int) -> None:
        """Check that `slots` slots exist."""
        if slots > self.slots:
            raise ValueError(f"the cache has {self.slots} slots, {slots} are needed")
