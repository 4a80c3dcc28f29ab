"""Products of the model in every format of a weight, and what stands in front of them, as calls that can be timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashdrive_node.engine.kernels.backend import has_fp8
from flashdrive_node.engine.kernels.elementwise import add_rms_norm, silu_mul
from flashdrive_node.engine.kernels.linear import MAX_ROWS, project, skinny_linear
from flashdrive_node.engine.kernels.quantised_linear import whole
from flashdrive_node.engine.kernels.rotate_quantise import add_norm_quantise, gate_quantise, quantise
from flashdrive_node.engine.kernels.row_formats import QuantisedRows, Rotation, RowFormat
from flashdrive_node.engine.kernels.triton_byte_linear import byte_parts
from flashdrive_node.engine.kernels.triton_int4_linear import int4_parts
from flashdrive_node.engine.kernels.triton_linear import Tiling
from flashdrive_node.evaluation.humming_cases import HUMMING, Humming, HummingProducts
from flashdrive_node.evaluation.random_quantised import fill_random, random_four_bits
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.fp8 import E4M3, Fp8Linear
from flashdrive_node.model.int4 import PackedInt4
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.linear import RowwiseLinear
from flashdrive_node.model.paro_layouts import GROUP_SIZE
from flashdrive_node.model.paroquant import ParoLinear

#: Of every table: PyTorch's product, our own, `torch._scaled_mm`, and our own of other formats.
FORMATS = ("bf16", "bf16 own", "fp8", "fp8 own", "int8 own", "w4a16", "w4a8")
#: Tokens of passes of the text layers: one, a checked block, two, six blocks, waypoints, a streamed prefill.
TEXT_TOKENS = (1, 8, 16, 48, 64, 897)
_HEAD_TOKENS, _EXPERT_TOKENS = (1, 8, 48), (64, 384)
#: Images of a streamed window, of 720 patches each.
_PATCHES = (4 * 720,)
#: Weights are as many as fill a cache several times over, so that none helps.
_COLD_BYTES = 1 << 27

Calls = Sequence[Callable[[], object]]
_Rowwise = TypeVar("_Rowwise", bound=RowwiseLinear)


@dataclass(frozen=True)
class FormatCase:
    """One shape in several formats. Calls of a format do the same over weights of their own."""

    name: str
    tokens: int
    calls: Mapping[str, Calls]
    #: Of one weight, by format.
    weight_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Matrix:
    """A weight, and with how many rows of inputs it is met."""

    name: str
    rows: int
    columns: int
    tokens: tuple[int, ...]
    #: The text layers have 4 bits at choice, the output head 8.
    kind: str


def matrices(config: AlpamayoConfig) -> list[Matrix]:
    """Of the language model, a layer of the expert, and a block of the vision tower."""
    text, expert, vision = config.text, config.expert, config.vision
    found = []
    for prefix, stack, tokens in (("", text, TEXT_TOKENS), ("expert ", expert, _EXPERT_TOKENS)):
        hidden, kind = stack.hidden_size, prefix.strip() or "text"
        found += [
            Matrix(f"{prefix}q/k/v", stack.q_size + 2 * stack.kv_size, hidden, tokens, kind),
            Matrix(f"{prefix}attention output", hidden, stack.q_size, tokens, kind),
            Matrix(f"{prefix}gate/up", 2 * stack.intermediate_size, hidden, tokens, kind),
            Matrix(f"{prefix}down", hidden, stack.intermediate_size, tokens, kind),
        ]
    size, mlp = vision.hidden_size, vision.intermediate_size
    found += [
        Matrix("output head", config.tokens.vocab_size, text.hidden_size, _HEAD_TOKENS, "head"),
        Matrix("vision q/k/v", 3 * size, size, _PATCHES, "vision"),
        Matrix("vision first of MLP", mlp, size, _PATCHES, "vision"),
    ]
    return found


def format_cases(
    config: AlpamayoConfig, device: torch.device, dtype: torch.dtype, humming: Humming | None = None
) -> Iterator[FormatCase]:
    """Every case, its buffers allocated when it is asked for.

    Args:
        config, device, dtype: As in `kernel_cases`.
        humming: Adds the columns `HUMMING` as far as the package can compute them, and is told where it cannot.
    """
    generator = torch.Generator(device).manual_seed(0)
    text = config.text
    for tokens in TEXT_TOKENS:
        yield _norm_case(text.hidden_size, tokens, dtype, generator)
        yield _gate_case(text.intermediate_size, tokens, dtype, generator)
    for matrix in matrices(config):
        yield from _product_cases(matrix, dtype, generator, humming)


def tiling_cases(config: AlpamayoConfig, device: torch.device, dtype: torch.dtype) -> Iterator[FormatCase]:
    """Products with 4-bit weights in several tilings, by which one is chosen."""
    generator = torch.Generator(device).manual_seed(0)
    for matrix in matrices(config):
        if matrix.kind != "text" or matrix.columns % GROUP_SIZE:
            continue
        layers = _four_bits(matrix, generator)
        for tokens, tilings in ((8, _few_tilings()), (TEXT_TOKENS[-1], _many_tilings())):
            rows = quantise(_normal(generator, dtype, tokens, matrix.columns), _turned(layers[0], torch.int8))
            calls = {_tiling_name(t): [partial(_four_bit_product, rows, w.packed, t) for w in layers] for t in tilings}
            yield FormatCase(
                _title(matrix), tokens, calls, dict.fromkeys(calls, sum(t.nbytes for t in layers[0].packed))
            )


def _few_tilings() -> list[Tiling]:
    return [
        Tiling(rows, 16, splits, warps, stages)
        for rows, warps in ((64, 4), (128, 4), (128, 8))
        for splits in (1, 2, 4)
        for stages in (4, 8)
    ]


def _many_tilings() -> list[Tiling]:
    shapes = ((128, 128, 8, 3), (128, 128, 8, 4), (128, 256, 8, 3), (64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 4))
    return [Tiling(rows, block, 1, warps, stages) for rows, block, warps, stages in shapes]


def _tiling_name(t: Tiling) -> str:
    return f"{t.rows} x {t.block}, {t.splits} split(s), {t.warps} warps, {t.stages} stages"


def _norm_case(size: int, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> FormatCase:
    x, update, weight = (_normal(generator, dtype, *shape) for shape in ((tokens, size), (tokens, size), (size,)))
    calls: dict[str, Calls] = {"bf16 own": [partial(add_rms_norm, x, update, weight, 1e-6)]}
    calls |= {
        name: [partial(add_norm_quantise, x, update, weight, 1e-6, form)]
        for name, form in _row_formats(size, dtype, generator).items()
    }
    return FormatCase(f"sum, norm and rounding, {size}", tokens, calls, {})


def _gate_case(size: int, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> FormatCase:
    gate_up = _normal(generator, dtype, tokens, 2 * size)
    calls: dict[str, Calls] = {"bf16 own": [partial(silu_mul, gate_up)]}
    for name, form in _row_formats(size, dtype, generator).items():
        calls[name] = [partial(gate_quantise, gate_up, form)]
    return FormatCase(f"gate and rounding, {size}", tokens, calls, {})


def _row_formats(size: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, RowFormat]:
    forms = {"fp8 own": RowFormat(E4M3)} if has_fp8(generator.device) else {}
    if size % GROUP_SIZE == 0:
        layer = ParoLinear(random_four_bits(8, size, generator))
        forms |= {"w4a16": _turned(layer, dtype), "w4a8": _turned(layer, torch.int8)}
    return forms


def _product_cases(
    matrix: Matrix, dtype: torch.dtype, generator: torch.Generator, humming: Humming | None
) -> Iterator[FormatCase]:
    device = generator.device
    plain = [_normal(generator, dtype, matrix.rows, matrix.columns) for _ in range(_copies(matrix, dtype.itemsize))]
    fp8 = _rowwise(Fp8Linear, matrix, dtype, generator) if has_fp8(device) and matrix.kind != "head" else []
    int8 = _rowwise(Int8Linear, matrix, dtype, generator) if matrix.kind == "head" else []
    paro = _four_bits(matrix, generator) if matrix.kind == "text" and matrix.columns % GROUP_SIZE == 0 else []
    weight_bytes = {"bf16": plain[0].nbytes, "bf16 own": plain[0].nbytes}
    weight_bytes |= dict.fromkeys(("fp8", "fp8 own", "int8 own"), matrix.rows * matrix.columns)
    if paro:
        weight_bytes |= dict.fromkeys(("w4a16", "w4a8", *HUMMING), sum(t.nbytes for t in paro[0].packed))
    others = HummingProducts(humming, _title(matrix), [w.packed for w in paro], generator) if humming else None
    for tokens in matrix.tokens:
        x = _normal(generator, dtype, tokens, matrix.columns)
        calls: dict[str, Calls] = {"bf16": [partial(functional.linear, x, w) for w in plain]}
        if tokens <= MAX_ROWS:
            calls["bf16 own"] = [partial(skinny_linear, x, w) for w in plain]
            calls["int8 own"] = [partial(project, x, layer) for layer in int8]
        inputs = []
        if fp8:
            rows = quantise(x, RowFormat(E4M3))
            inputs.append(rows)
            assert rows.scales is not None
            calls["fp8"] = [partial(layer.product, rows.values, rows.scales[:, None], dtype) for layer in fp8]
            if tokens <= MAX_ROWS:
                calls["fp8 own"] = [partial(_fp8_product, rows, layer) for layer in fp8]
        for name, kind in (("w4a16", dtype), ("w4a8", torch.int8)):
            if paro:
                rows = quantise(x, _turned(paro[0], kind))
                inputs.append(rows)
                calls[name] = [partial(_four_bit_product, rows, layer.packed) for layer in paro]
        if others and paro:
            calls |= others.calls(inputs)
        yield FormatCase(_title(matrix), tokens, {name: c for name, c in calls.items() if c}, weight_bytes)


def _four_bit_product(rows: QuantisedRows, weight: PackedInt4, chosen: Tiling | None = None) -> Tensor:
    return whole(int4_parts(rows, weight, chosen), rows.dtype)


def _fp8_product(rows: QuantisedRows, layer: Fp8Linear) -> Tensor:
    assert rows.scales is not None
    return whole(byte_parts(rows.values, layer.weight_fp8, layer.row_scales, rows.scales, rows.dtype), rows.dtype)


def _turned(layer: ParoLinear, dtype: torch.dtype) -> RowFormat:
    rotation = Rotation(layer.channel_scales, layer.steps, layer.turns, layer.blocks, GROUP_SIZE)
    return RowFormat(dtype, rotation, GROUP_SIZE)


def _four_bits(matrix: Matrix, generator: torch.Generator) -> list[ParoLinear]:
    copies = range(_copies(matrix, 0.5))
    return [ParoLinear(random_four_bits(matrix.rows, matrix.columns, generator)) for _ in copies]


def _rowwise(
    kind: Callable[[nn.Linear], _Rowwise], matrix: Matrix, dtype: torch.dtype, generator: torch.Generator
) -> list[_Rowwise]:
    layers = []
    for _ in range(_copies(matrix, 1)):
        layers.append(kind(nn.Linear(matrix.columns, matrix.rows, bias=False, device="meta", dtype=dtype)))
        fill_random(layers[-1], dtype, generator)
    return layers


def _copies(matrix: Matrix, item_bytes: float) -> int:
    return max(1, math.ceil(_COLD_BYTES / (matrix.rows * matrix.columns * item_bytes)))


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)


def _title(matrix: Matrix) -> str:
    return f"{matrix.name} {matrix.rows} x {matrix.columns}"
