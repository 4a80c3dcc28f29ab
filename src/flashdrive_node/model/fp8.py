"""8-bit floats (e4m3) for weights and activations, a scale per row of each.

Rows of inputs are scaled to the format's range as they come. On GPUs with FP8 matrix units the product is
`torch._scaled_mm`; everywhere else the rounded values are multiplied in float32, which is the same but for the order of
the sums.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.linear import RowwiseLinear

E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(E4M3).max
#: Of a static scale: a floating format loses nothing by room for inputs that are larger than those of the calibration.
HEADROOM = 2.0
#: First compute capability with FP8 matrix units, and what sizes must be multiples of there.
_CAPABILITY, _MULTIPLE = (8, 9), 16


@lru_cache(maxsize=16)
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., K] to e4m3 of the same shape and their scales, float32 [..., 1]. Zero rows stay zero."""
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * _LARGEST) / _LARGEST
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(E4M3), scale


def round_by(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What `round_rows` gives, by one scale for all rows; what is beyond the range is cut off."""
    q = (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(E4M3)
    return q, torch.full((*x.shape[:-1], 1), scale, dtype=torch.float32, device=x.device)


class Fp8Linear(RowwiseLinear):
    """A linear layer of e4m3 weights and activations."""

    weight_fp8: Tensor
    row_scales: Tensor

    def __init__(self, dense: nn.Linear, largest_input: float | None = None):
        """Round a layer's weight; its bias is kept.

        Args:
            dense: The layer.
            largest_input: Size of the largest input that was met, for a scale that all tokens share. None scales every
                token by its own largest value.

        Raises:
            InputError: No positive number.
        """
        if largest_input is not None and not 0 < largest_input < float("inf"):
            raise InputError(f"fp8: a largest input above 0 is required, found {largest_input!r}")
        super().__init__(dense)
        #: Scale of all inputs; inputs beyond twice the largest that was met are cut off.
        self.input_scale = None if largest_input is None else HEADROOM * largest_input / _LARGEST

    def make_room(self, device: torch.device) -> None:
        """See `RowwiseLinear.make_room`."""
        size = (self.out_features, self.in_features)
        self.register_buffer("weight_fp8", torch.empty(size, dtype=E4M3, device=device))
        self.register_buffer("row_scales", torch.empty(size[0], 1, device=device))

    def fill(self, first: int, rows: Tensor) -> None:
        """See `RowwiseLinear.fill`."""
        self.weight_fp8[first : first + len(rows)], self.row_scales[first : first + len(rows)] = round_rows(rows)

    @property
    def format(self) -> str:  # type: ignore[override]
        """Of the weights, and how inputs are scaled."""
        return "fp8" if self.input_scale is None else "fp8_static"

    def forward(self, x: Tensor) -> Tensor:
        """See `QuantisedLinear.forward`."""
        q, scale = self.rounded(x.reshape(-1, self.in_features))
        return self.product(q, scale, x.dtype).unflatten(0, x.shape[:-1])

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [M, in_features] as the product takes them, and their scales [M, 1]."""
        return round_rows(x) if self.input_scale is None else round_by(x, self.input_scale)

    def product(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Product with rows of `rounded`, [M, in_features] and [M, 1] -> [M, out_features] of a type."""
        if self._has_matrix_units(q):
            # Sums in the matrix units' own registers: what that loses is far below the rounding to e4m3.
            out = torch._scaled_mm(
                q,
                self.weight_fp8.T,
                scale_a=scale,
                scale_b=self.row_scales.T,
                bias=None if self.bias is None else self.bias.bfloat16(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            return out.to(dtype)
        out = linear(q.float(), self.weight_fp8.float()) * scale * self.row_scales.T
        return (out if self.bias is None else out + self.bias.float()).to(dtype)

    def sums(self, q: Tensor) -> Tensor:
        """Product with rows of `rounded` in front of the scales of either: bfloat16 [M, out_features], without bias."""
        if self._has_matrix_units(q):
            one = _one(q.device)
            return torch._scaled_mm(
                q, self.weight_fp8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        return linear(q.float(), self.weight_fp8.float()).bfloat16()

    def rows(self, ids: Tensor) -> Tensor:
        """See `RowwiseLinear.rows`."""
        return self.weight_fp8[ids].float() * self.row_scales[ids]

    def _has_matrix_units(self, x: Tensor) -> bool:
        fits = self.in_features % _MULTIPLE == 0 and self.out_features % _MULTIPLE == 0
        return x.is_cuda and fits and torch.cuda.get_device_capability(x.device) >= _CAPABILITY
