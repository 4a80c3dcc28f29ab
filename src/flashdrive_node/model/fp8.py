"""8-bit floats (e4m3) for weights and activations, a scale per row of each.

Rows of inputs are scaled to the format's range as they come. On GPUs with FP8 matrix units the product is
`torch._scaled_mm`; everywhere else the rounded values are multiplied in float32, which is the same but for the order of
the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from flashdrive_node.model.linear import RowwiseLinear

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max
#: First compute capability with FP8 matrix units, and what sizes must be multiples of there.
_CAPABILITY, _MULTIPLE = (8, 9), 16


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., K] to e4m3 of the same shape and their scales, float32 [..., 1]. Zero rows stay zero."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * _LARGEST) / _LARGEST
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(E4M3), scale


class Fp8Linear(RowwiseLinear):
    """A linear layer of e4m3 weights and activations."""

    format = "fp8"
    weight_fp8: Tensor
    row_scales: Tensor

    def make_room(self, device: torch.device) -> None:
        """See `RowwiseLinear.make_room`."""
        size = (self.out_features, self.in_features)
        self.register_buffer("weight_fp8", torch.empty(size, dtype=E4M3, device=device))
        self.register_buffer("row_scales", torch.empty(size[0], 1, device=device))

    def fill(self, first: int, rows: Tensor) -> None:
        """See `RowwiseLinear.fill`."""
        self.weight_fp8[first : first + len(rows)], self.row_scales[first : first + len(rows)] = round_rows(rows)

    def forward(self, x: Tensor) -> Tensor:
        """See `QuantisedLinear.forward`."""
        rows = x.reshape(-1, self.in_features)
        q, scale = round_rows(rows)
        if self._has_matrix_units(x):
            out = torch._scaled_mm(
                q, self.weight_fp8.T, scale_a=scale, scale_b=self.row_scales.T, out_dtype=torch.bfloat16
            ).to(x.dtype)
        else:
            out = (linear(q.float(), self.weight_fp8.float()) * scale * self.row_scales.T).to(x.dtype)
        if self.bias is not None:
            out = out + self.bias.to(x.dtype)
        return out.unflatten(0, x.shape[:-1])

    def rows(self, ids: Tensor) -> Tensor:
        """See `RowwiseLinear.rows`."""
        return self.weight_fp8[ids].float() * self.row_scales[ids]

    def _has_matrix_units(self, x: Tensor) -> bool:
        fits = self.in_features % _MULTIPLE == 0 and self.out_features % _MULTIPLE == 0
        return x.is_cuda and fits and torch.cuda.get_device_capability(x.device) >= _CAPABILITY
