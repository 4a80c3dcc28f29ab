"""8-bit integers for weights that are read more often than computed with: the output head.

Activations stay as they are; the kernels of GPUs round them to 15 bits behind a row's largest value, far finer than the
weight. Elsewhere the weight is expanded some rows at a time, so that no copy of it is ever whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashdrive_node.model.linear import ROWS_AT_ONCE, RowwiseLinear

_LARGEST = 127


class Int8Linear(RowwiseLinear):
    """A linear layer of int8 weights with a scale per row, and without bias."""

    format = "int8"
    weight_int8: Tensor
    row_scales: Tensor

    def __init__(self, dense: nn.Linear):
        """Round a layer's weight to the nearest."""
        if dense.bias is not None:
            raise ValueError(f"an output head without bias is required, found one of {list(dense.bias.shape)}")
        super().__init__(dense)

    def make_room(self, device: torch.device) -> None:
        """See `RowwiseLinear.make_room`."""
        size = (self.out_features, self.in_features)
        self.register_buffer("weight_int8", torch.empty(size, dtype=torch.int8, device=device))
        self.register_buffer("row_scales", torch.empty(size[0], device=device))

    def fill(self, first: int, rows: Tensor) -> None:
        """See `RowwiseLinear.fill`."""
        rows = rows.float()
        scales = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        self.weight_int8[first : first + len(rows)] = (rows / scales[:, None]).round().to(torch.int8)
        self.row_scales[first : first + len(rows)] = scales

    def forward(self, x: Tensor) -> Tensor:
        """See `QuantisedLinear.forward`."""
        parts = zip(self.weight_int8.split(ROWS_AT_ONCE), self.row_scales.split(ROWS_AT_ONCE), strict=True)
        return torch.cat([(linear(x, part.to(x.dtype)) * scale).to(x.dtype) for part, scale in parts], dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        """See `RowwiseLinear.rows`."""
        return self.weight_int8[ids].float() * self.row_scales[ids, None]
