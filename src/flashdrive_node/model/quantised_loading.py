"""Puts quantised layers in their places while a checkpoint is read.

A layer's packed tensors are read into a `StoredLayer`. The moment that it is complete the layer proper takes its place,
and the packed tensors are freed. A plain weight that is wanted in fewer bits is rounded row by row as it comes, and is
never whole in memory. So at no time is more there than what is kept, the packed layers that are being read, and what
the reading threads hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.int4 import Int4Weight
from flashdrive_node.model.linear import QuantisedLinear, RowwiseLinear, SideBySide
from flashdrive_node.model.paroquant import ParoLinear, ParoWeight
from flashdrive_node.model.quantised_files import StoredMatrix
from flashdrive_node.model.safetensors_file import DTYPES
from flashdrive_node.model.state_dict import TensorSlot

#: From an `nn.Linear` to what stands in its place.
Convert = Callable[[nn.Linear], RowwiseLinear]


class StoredLayer(nn.Module):
    """The packed tensors of one linear layer, as its files have them, by matrix."""

    def __init__(self, matrices: Sequence[StoredMatrix]):
        super().__init__()
        self.matrices = matrices
        for matrix in matrices:
            held = nn.Module()
            for slot in matrix.slots().values():
                with torch.device("meta"):
                    held.register_buffer(
                        slot.target.rpartition(".")[2], torch.empty(slot.shape, dtype=DTYPES[slot.types[0]])
                    )
            self.add_module(f"row_{matrix.slot.row}", held)

    def linear(self, int8_from: int) -> QuantisedLinear:
        """The layer; all tensors must be there. `int8_from`: see `ParoLinear`.

        Raises:
            CheckpointError: Tensors that make up no layer.
        """
        weights = []
        for matrix in self.matrices:
            tensors: dict[str, Tensor] = {
                name: self.get_buffer(slot.target.removeprefix(f"{matrix.module}."))
                for name, slot in matrix.slots().items()
            }
            weights.append(matrix.layout.read(tensors))
        try:
            return paro_linear(weights, int8_from)
        except InputError as error:
            raise CheckpointError(self.matrices[0].stem, [str(error)]) from error


def paro_linear(weights: Sequence[ParoWeight], int8_from: int) -> QuantisedLinear:
    """Layers on one input as one: a single matrix where they share the rotation, else side by side."""
    first = weights[0]
    if not all(first.shares_input_with(other) for other in weights[1:]):
        return SideBySide([ParoLinear(weight, int8_from) for weight in weights])
    matrix = Int4Weight(*(torch.cat(tensors) for tensors in zip(*(w.matrix for w in weights), strict=True)))
    return ParoLinear(first._replace(matrix=matrix), int8_from)


class LayerPlacer:
    """Is told of complete tensors (`load_weights`) and puts layers in their places."""

    def __init__(
        self,
        model: nn.Module,
        stored: dict[str, list[StoredMatrix]],
        int8_from: int,
        convert: dict[str, Convert],
        device: torch.device | str,
    ):
        """Put a `StoredLayer` where the files hold packed tensors.

        Args:
            model: On the meta device.
            stored: Packed matrices by the linear layer that they make up.
            int8_from: See `ParoLinear`.
            convert: What becomes of plain linear layers, by their names.
            device: Where the layers go.
        """
        self.model, self.int8_from = model, int8_from
        self.open: dict[str, set[str]] = {}
        for name, matrices in stored.items():
            replace_module(model, name, StoredLayer(matrices))
            self.open[name] = {slot.target for matrix in matrices for slot in matrix.slots().values()}
        self._rounding: dict[str, _Rounding] = {}
        for name, make in convert.items():
            dense = model.get_submodule(name)
            if not isinstance(dense, nn.Linear):
                raise TypeError(f"{name}: a plain linear layer is required, found {type(dense).__name__}")
            self._rounding[f"{name}.weight"] = _Rounding(make(dense), dense.weight.dtype, device)
            self.open[name] = {f"{name}.{leaf}" for leaf, _ in dense.named_parameters()}
        self._layer_of = {target: name for name, targets in self.open.items() for target in targets}

    def take(self, slot: TensorSlot, first: int, elements: Tensor) -> bool:
        """Is offered every piece of a tensor; whether it was for a layer that is rounded as it comes.

        Args:
            slot: The tensor.
            first: The first element of the piece in it; pieces of a tensor come in order.
            elements: [n], on the host or the device, of any floating type; not valid later.
        """
        rounding = self._rounding.get(slot.target)
        if rounding is None:
            return False
        rounding.take(slot.row, first, elements)
        return True

    def completed(self, target: str) -> None:
        """A parameter or buffer has all its elements."""
        name = self._layer_of.get(target)
        if name is None:
            return
        self.open[name].discard(target)
        if self.open[name]:
            return
        layer = self.model.get_submodule(name)
        if isinstance(layer, StoredLayer):
            replace_module(self.model, name, layer.linear(self.int8_from))
        else:
            rounded = self._rounding.pop(f"{name}.weight").layer
            if layer.bias is not None:
                rounded.bias = layer.get_parameter("bias").detach()
            replace_module(self.model, name, rounded)


class _Rounding:
    """A layer that fills row by row."""

    def __init__(self, layer: RowwiseLinear, dtype: torch.dtype, device: torch.device | str):
        self.layer, self.dtype, self.device = layer, dtype, device
        #: What came of the next row, by the row in the layer that its tensor begins at.
        self._begun: dict[int, Tensor] = {}

    def take(self, row: int, first: int, elements: Tensor) -> None:
        if next(self.layer.buffers()).is_meta:
            self.layer.to_empty(device=self.device)
        elements = elements.to(self.device, non_blocking=True).to(self.dtype)
        begun = self._begun.pop(row, elements[:0])
        size = self.layer.in_features
        row_number = row + (first - len(begun)) // size
        elements = torch.cat((begun, elements))
        whole = len(elements) // size * size
        if whole:
            self.layer.fill(row_number, elements[:whole].view(-1, size))
        self._begun[row] = elements[whole:].clone()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module.requires_grad_(False).eval())
