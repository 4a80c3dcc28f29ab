"""What may stand in the place of a matrix product: a weight in a format of its own.

The networks ask for a linear layer. That is `torch.nn.Linear`, or a module with this interface; a format is one file
with a subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Rows of a weight that are expanded or rounded at once, so that no copy of a large one is ever whole.
ROWS_AT_ONCE = 16_384


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


class RowwiseLinear(QuantisedLinear):
    """A layer whose rows are rounded one by one, so that a plain weight becomes one while it is read."""

    bias: Tensor | None

    def __init__(self, dense: nn.Linear):
        """Round a layer's weight; its bias is kept. Of a layer on the meta device, only make room (`fill`)."""
        super().__init__(dense.in_features, dense.out_features)
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach())
        self.make_room(dense.weight.device)
        if not dense.weight.is_meta:
            for first in range(0, self.out_features, ROWS_AT_ONCE):
                self.fill(first, dense.weight.detach()[first : first + ROWS_AT_ONCE])

    @abstractmethod
    def make_room(self, device: torch.device) -> None:
        """Register the buffers of the weight, with nothing in them."""

    @abstractmethod
    def fill(self, first: int, rows: Tensor) -> None:
        """Round rows of the weight, [n, in_features] of a floating type, into their places from row `first` on."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: int64 [n] -> float32 [n, in_features]."""

    def dequantised(self) -> Tensor:
        """See `QuantisedLinear.dequantised`."""
        device = next(self.buffers()).device
        return self.rows(torch.arange(self.out_features, device=device))


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
