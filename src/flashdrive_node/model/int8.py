"""8-bit integers for weights that are read more often than computed with: the output head.

Activations stay as they are. The weight is expanded some rows at a time, so that no copy of it is ever whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashdrive_node.model.linear import QuantisedLinear

_LARGEST = 127
#: Rows that are expanded at once.
_ROWS = 16_384


class Int8Linear(QuantisedLinear):
    """A linear layer of int8 weights with a scale per row, and without bias."""

    format = "int8"
    weight_int8: Tensor
    row_scales: Tensor

    def __init__(self, dense: nn.Linear):
        """Round a layer's weight to the nearest."""
        super().__init__(dense.in_features, dense.out_features)
        if dense.bias is not None:
            raise ValueError(f"an output head without bias is required, found one of {list(dense.bias.shape)}")
        weight = dense.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        self.register_buffer("weight_int8", (weight / scales[:, None]).round().to(torch.int8))
        self.register_buffer("row_scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """See `QuantisedLinear.forward`."""
        parts = zip(self.weight_int8.split(_ROWS), self.row_scales.split(_ROWS), strict=True)
        return torch.cat([(linear(x, part.to(x.dtype)) * scale).to(x.dtype) for part, scale in parts], dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix: int64 [n] -> float32 [n, in_features]."""
        return self.weight_int8[ids].float() * self.row_scales[ids, None]

    def dequantised(self) -> Tensor:
        """See `QuantisedLinear.dequantised`."""
        return self.weight_int8.float() * self.row_scales[:, None]
