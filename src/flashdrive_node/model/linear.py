"""What may stand in the place of a matrix product: a weight in a format of its own.

The networks ask for a linear layer. That is `torch.nn.Linear`, or a module with this interface; a format is one file
with a subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class QuantisedLinear(nn.Module, ABC):
    """A linear layer without `weight`: rows of inputs to rows of outputs."""

    #: Of the format, for reports.
    format: str

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] of a floating type -> [..., out_features] of the same type."""

    @abstractmethod
    def dequantised(self) -> Tensor:
        """The matrix that the layer multiplies by, float32 [out_features, in_features], activations aside."""

    @property
    def nbytes(self) -> int:
        """Memory of the stored tensors."""
        return sum(t.nbytes for t in self.buffers())

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        return f"{self.format}, {self.in_features} -> {self.out_features}"


class SideBySide(QuantisedLinear):
    """Layers on the same input whose outputs stand side by side, where they cannot be one matrix."""

    def __init__(self, parts: Sequence[QuantisedLinear]):
        super().__init__(parts[0].in_features, sum(part.out_features for part in parts))
        self.format = parts[0].format
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """See `QuantisedLinear.forward`."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def dequantised(self) -> Tensor:
        """See `QuantisedLinear.dequantised`."""
        return torch.cat([part.dequantised() for part in self.parts if isinstance(part, QuantisedLinear)])
