"""Products with quantised weights, by format, and what stands in front of them.

A layer whose kernels can run on a device says in which format they take rows (`row_format`); norms and the gate make
them so at once. Every other layer takes rows as they are and does what is its own with them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashdrive_node.engine.kernels.backend import has_fp8, uses_triton
from flashdrive_node.engine.kernels.elementwise import add_rms_norm, rms_norm, silu_mul
from flashdrive_node.engine.kernels.parts import is_parts
from flashdrive_node.engine.kernels.rotate_quantise import add_norm_quantise, gate_quantise, norm_quantise, quantise
from flashdrive_node.engine.kernels.row_formats import QuantisedRows, Rotation, RowFormat, Unscaled
from flashdrive_node.model.decoder import RMSNorm
from flashdrive_node.model.fp8 import E4M3, Fp8Linear
from flashdrive_node.model.int4_linear import Int4Linear
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.linear import QuantisedLinear, RowwiseLinear
from flashdrive_node.model.paroquant import ParoLinear

#: What a layer takes.
Rows = Tensor | QuantisedRows
#: Group sizes of 4-bit weights that fill the matrix units.
_GROUP_SIZES = (64, 128, 256)
#: Rows up to which products with 8-bit weights are our own.
FEW_FP8_ROWS, FEW_INT8_ROWS = 64, 64


def row_format(layer: nn.Module | None, x: Tensor) -> RowFormat | None:
    """In which format a layer's kernel takes rows like `x`; None where it takes them as they are."""
    if layer is None or not uses_triton(x):
        return None
    if isinstance(layer, ParoLinear) and layer.packed.group_size in _GROUP_SIZES:
        size = layer.packed.group_size
        rotation = Rotation(layer.channel_scales, layer.steps, layer.turns, layer.blocks, size)
        return RowFormat(x.dtype if len(x) < layer.int8_from else torch.int8, rotation, size)
    if isinstance(layer, Int4Linear):
        return RowFormat(x.dtype, group_size=layer.packed.group_size)
    if isinstance(layer, Fp8Linear) and has_fp8(x.device):
        return RowFormat(E4M3, scale=layer.input_scale)
    return None


def norm_for(reader: nn.Module | None, x: Tensor, norm: RMSNorm) -> Rows:
    """`rms_norm` of [T, size], as the layer that reads it takes it; None stands for any other reader."""
    form = row_format(reader, x)
    if form is None:
        return rms_norm(x, norm.weight, norm.eps)
    return norm_quantise(x, norm.weight, norm.eps, form)


def add_norm_for(reader: nn.Module | None, x: Tensor, update: Tensor | Unscaled, norm: RMSNorm) -> tuple[Tensor, Rows]:
    """`add_rms_norm`: the sum, and its norm as the layer that reads it takes it."""
    form = row_format(reader, x)
    if isinstance(update, Unscaled) and (form is None or form.group_size is not None):
        update = whole(update, x.dtype)
    if form is None:
        assert isinstance(update, Tensor)
        return add_rms_norm(x, update, norm.weight, norm.eps)
    return add_norm_quantise(x, update, norm.weight, norm.eps, form)


def gate_for(reader: nn.Module | None, gate_up: Tensor | Unscaled) -> Rows:
    """`silu_mul`, as the layer that reads it takes it."""
    form = row_format(reader, gate_up.sums if isinstance(gate_up, Unscaled) else gate_up)
    if isinstance(gate_up, Unscaled) and (form is None or form.group_size is not None):
        gate_up = whole(gate_up, gate_up.sums.dtype)
    if form is None:
        assert isinstance(gate_up, Tensor)
        return silu_mul(gate_up)
    return gate_quantise(gate_up, form)


def unscaled(x: Rows, layer: nn.Module) -> Unscaled | None:
    """A product of many rows in front of its scales, for a kernel that multiplies them in; None of any other.

    `torch._scaled_mm` is faster without scales of rows: by a fifth at 897 rows, by a third where it has few tiles.
    """
    if not isinstance(layer, Fp8Linear) or layer.bias is not None or len(x) <= FEW_FP8_ROWS:
        return None
    if x.dtype != torch.bfloat16:  # sums may be larger than float16 holds
        return None
    if isinstance(x, Tensor):
        form = row_format(layer, x)
        if form is None:
            return None
        x = quantise(x, form)
    assert x.scales is not None
    return Unscaled(layer.sums(x.values), x.scales, layer.row_scales)


def quantised_parts(x: Rows, layer: nn.Module) -> Tensor:
    """Product with a layer's weight: [M, N] in the type that x was made of, or float32 parts of it (see `parts`)."""
    if isinstance(x, Tensor):
        form = row_format(layer, x)
        if form is not None:
            x = quantise(x, form)
        elif isinstance(layer, Int8Linear) and len(x) <= FEW_INT8_ROWS and uses_triton(x):
            from flashdrive_node.engine.kernels.triton_byte_linear import byte_parts
            from flashdrive_node.engine.kernels.triton_round_rows import round_twice

            terms, scales = round_twice(x)
            return byte_parts(terms, layer.weight_int8, layer.row_scales, scales, x.dtype)
        else:
            result: Tensor = layer(x)
            return result
    if isinstance(layer, ParoLinear | Int4Linear):
        from flashdrive_node.engine.kernels.triton_int4_linear import int4_parts

        return _with_bias(int4_parts(x, layer.packed), layer, x.dtype)
    assert isinstance(layer, Fp8Linear)
    return _fp8_parts(x, layer)


def whole(product: Tensor | Unscaled, dtype: torch.dtype) -> Tensor:
    """A product of `quantised_parts` or `unscaled` as [M, N] in a type."""
    if isinstance(product, Unscaled):
        return (product.sums.float() * product.token_scales[:, None] * product.row_scales.view(1, -1)).to(dtype)
    if not is_parts(product):
        return product
    from flashdrive_node.engine.kernels.triton_linear import sum_parts

    return sum_parts(product, dtype)


def _fp8_parts(x: QuantisedRows, layer: Fp8Linear) -> Tensor:
    assert x.scales is not None
    if len(x) > FEW_FP8_ROWS:
        return layer.product(x.values, x.scales[:, None], x.dtype)
    from flashdrive_node.engine.kernels.triton_byte_linear import byte_parts

    parts = byte_parts(x.values, layer.weight_fp8, layer.row_scales, x.scales, x.dtype)
    return _with_bias(parts, layer, x.dtype)


def _with_bias(parts: Tensor, layer: QuantisedLinear, dtype: torch.dtype) -> Tensor:
    bias = layer.bias if isinstance(layer, RowwiseLinear) else None
    return parts if bias is None else whole(parts, dtype) + bias.to(dtype)
