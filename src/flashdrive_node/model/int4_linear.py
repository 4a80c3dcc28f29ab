"""4-bit integers in groups along the inputs, without a rotation: the output head, where its texts stay the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.int4 import PackedInt4, dequantise, pack_groups, quantise, unpack_groups
from flashdrive_node.model.linear import RowwiseLinear
from flashdrive_node.model.paroquant import int4_linear

#: Inputs that share a scale.
GROUP_SIZE = 128


class Int4Linear(RowwiseLinear):
    """A linear layer of 4-bit weights rounded to the nearest; activations stay as they are."""

    format = "int4"
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, dense: nn.Linear):
        """Round a layer's weight to the nearest; its bias is kept.

        Raises:
            InputError: Columns that make no whole groups.
        """
        if dense.in_features % GROUP_SIZE:
            raise InputError(f"int4: columns in groups of {GROUP_SIZE} are required, found {dense.in_features}")
        super().__init__(dense)

    def make_room(self, device: torch.device) -> None:
        """See `RowwiseLinear.make_room`."""
        groups, rows = self.in_features // GROUP_SIZE, self.out_features
        self.register_buffer("codes", torch.empty(groups, rows, GROUP_SIZE // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(groups, rows, dtype=torch.float16, device=device))
        self.register_buffer("zeros", torch.empty(groups, rows, dtype=torch.uint8, device=device))

    def fill(self, first: int, rows: Tensor) -> None:
        """See `RowwiseLinear.fill`."""
        for whole, part in zip(self.packed, pack_groups(quantise(rows, GROUP_SIZE)), strict=True):
            whole[:, first : first + len(rows)] = part

    @property
    def packed(self) -> PackedInt4:
        """The weight as it is kept."""
        return PackedInt4(self.codes, self.scales, self.zeros)

    def forward(self, x: Tensor) -> Tensor:
        """See `QuantisedLinear.forward`."""
        out = int4_linear(x.float(), self.packed).to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """See `RowwiseLinear.rows`."""
        return dequantise(unpack_groups(PackedInt4(*(part[:, ids] for part in self.packed))))
