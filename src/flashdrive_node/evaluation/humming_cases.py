"""4-bit products of the package `humming-kernels`, where it is installed, as calls that can be timed beside ours.

It is no dependency, and what it cannot do here becomes a note. Its weights are made of the codes and zero points of
ours; scales are drawn for every group, since a product that mixes groups up would pass with equal ones, and are of the
product's type, as it takes them. Rows come rounded, as ours do. Tilings are those that it chooses itself. A product is
compared with one in float32 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flashdrive_node.engine.kernels.row_formats import QuantisedRows
from flashdrive_node.evaluation.kernel_benchmark import pass_ms
from flashdrive_node.model.fp8 import E4M3
from flashdrive_node.model.int4 import PackedInt4, unpack_groups
from flashdrive_node.model.paroquant import int4_linear

#: Columns of a table, by what rows are: 16-bit floats, int8, e4m3.
HUMMING = ("humming w4a16", "humming w4a8", "humming w4a8 fp8")
#: Columns of rows that are not of the product's type, and what the package calls theirs.
_ROUNDED = {torch.int8: (HUMMING[1], "int8"), E4M3: (HUMMING[2], "float8e4m3")}
#: Bounds of a product's error: its norm by the product's, and the largest one by the root of the product's mean square.
#: Rounding weights and results to bfloat16 takes about 0.002 of the first and 0.02 of the second.
_NORM, _LARGEST = 1e-2, 1e-1
_REASON_LENGTH = 240


class Humming:
    """The package, if it loads, and what is to be said about it."""

    def __init__(self) -> None:
        #: Its `HummingLayer`.
        self.layer: Callable[..., Any] | None = None
        #: Largest norm of an error in every column, and what failed.
        self.errors: dict[str, float] = {}
        self.failures: list[str] = []
        try:
            self.layer = import_module("humming.layer").HummingLayer
        except Exception as error:  # it loads libraries and looks for a compiler: errors are of all kinds
            self.failures.append(f"humming-kernels does not load: {_reason(error)}")

    def notes(self) -> list[str]:
        """What belongs below a table, line by line."""
        return [f"{name}: relative errors of up to {error:.1e}" for name, error in self.errors.items()] + self.failures


class HummingProducts:
    """Products with weights of one shape."""

    def __init__(self, humming: Humming, title: str, weights: Sequence[PackedInt4], generator: torch.Generator):
        """Draw scales; weights are packed when rows of their format come.

        Args:
            humming: Takes the notes.
            title: Of the shape, for them.
            weights: [N, K] each.
            generator: On their device.
        """
        self._humming, self._title = humming, title
        self._weights = [w._replace(scales=w.scales * _factors(w.scales, generator)) for w in weights]
        #: By column; none where they failed.
        self._layers: dict[str, list[Any]] = {}

    def calls(self, inputs: Sequence[QuantisedRows]) -> dict[str, Sequence[Callable[[], object]]]:
        """By column, one call for every weight; columns that fail are left out.

        Args:
            inputs: Rows [M, K] in several formats, int8 and e4m3 ones with their scales.
        """
        found: dict[str, Sequence[Callable[[], object]]] = {}
        for rows in inputs if self._humming.layer else ():
            column, kind = _ROUNDED.get(rows.values.dtype, (HUMMING[0], str(rows.dtype).removeprefix("torch.")))
            scales = None if rows.scales is None else rows.scales[:, None]
            try:
                if column not in self._layers:
                    self._layers[column] = [self._layer(weight, kind, rows.dtype) for weight in self._weights]
                calls = [partial(layer, rows.values, input_scale=scales) for layer in self._layers[column]]
                if calls:
                    self._check(column, calls[0](), rows)  # compiles
                    pass_ms(calls[:1], rows.values.device, repeats=1)  # one that no graph can hold fails here
                    found[column] = calls
            except ArithmeticError as error:
                self._fail(column, rows, error)
            except Exception as error:  # of the package, its compiler or the device
                self._layers[column] = []  # at other numbers of rows it would only fail again, after some minutes
                self._fail(column, rows, error)
        return found

    def _layer(self, weight: PackedInt4, kind: str, dtype: torch.dtype) -> Any:
        """A layer of the package, which takes codes of eight columns, and zero points of eight rows, as one int32."""
        assert self._humming.layer is not None
        matrix = unpack_groups(weight)
        rows, columns = matrix.shape
        layer = self._humming.layer(
            shape_n=rows,
            shape_k=columns,
            weight_config={"dtype": "uint4", "group_size": matrix.group_size, "has_zero_point": True},
            input_config={"dtype": kind},
            torch_dtype=dtype,
        ).to(matrix.codes.device)
        places = torch.arange(0, 32, 4, dtype=torch.int32, device=matrix.zeros.device)
        zeros = matrix.zeros.int().unflatten(0, (-1, 8)) << places[:, None]
        layer.load_from_tensors(
            {
                "weight": matrix.codes.view(torch.int32),
                "weight_scale": matrix.scales.to(dtype),
                "zero_point": zeros.sum(dim=1, dtype=torch.int32),
            }
        )
        layer.transform()
        return layer

    def _check(self, column: str, product: Tensor, rows: QuantisedRows) -> None:
        weight = self._weights[0]
        expected = int4_linear(rows.values.float(), weight._replace(scales=weight.scales.to(rows.dtype)))
        if rows.scales is not None:
            expected *= rows.scales[:, None]
        error = product.float() - expected
        norm = float(error.norm() / expected.norm())
        largest = float(error.abs().max() / expected.square().mean().sqrt())
        if not (norm <= _NORM and largest <= _LARGEST):  # nor where they are nan
            raise ArithmeticError(f"wrong, with errors of {norm:.1e}, the largest of {largest:.1e}")
        self._humming.errors[column] = max(norm, self._humming.errors.get(column, 0.0))

    def _fail(self, column: str, rows: QuantisedRows, error: Exception) -> None:
        self._humming.failures.append(f"{column}, {self._title}, {len(rows)} rows: {_reason(error)}")


def _factors(scales: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(scales).uniform_(0.5, 1.5, generator=generator)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_LENGTH]
