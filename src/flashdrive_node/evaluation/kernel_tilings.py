"""Tilings of the bf16 kernels beside those in use, at the shapes of one sample's window and of six."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from flashdrive_node.engine.kernels import triton_attention, triton_linear
from flashdrive_node.engine.kernels.backend import multiprocessors
from flashdrive_node.evaluation.format_cases import FormatCase
from flashdrive_node.evaluation.kernel_cases import Buffers, Matrix, Seen, Shapes, attentions, cache_slots, matrices
from flashdrive_node.model.config import AlpamayoConfig

#: Of a multiprocessor that tiles in flight may take; a launch that needs more is an error.
_SHARED_BYTES = 200 * 1024

AnyTiling = TypeVar("AnyTiling", triton_attention.Tiling, triton_linear.Tiling)


def bf16_tiling_cases(
    config: AlpamayoConfig, shapes: Shapes, device: torch.device, dtype: torch.dtype
) -> Iterator[FormatCase]:
    """Attentions and products under the tiling in use and its neighbours; arguments as in `kernel_cases`."""
    buffers, slots = Buffers(device, dtype), cache_slots(config, shapes)
    layer = (config.text.num_kv_heads, slots, config.text.head_dim)
    cache = [(buffers.draw(*layer), buffers.draw(*layer)) for _ in range(config.text.num_layers)]
    for seen in attentions(config, shapes, device):
        yield _attention_case(seen, cache, buffers)
    for matrix in matrices(config, shapes):
        yield _product_case(matrix, buffers)


def neighbours(tiling: AnyTiling) -> list[AnyTiling]:
    """Tilings that differ from one in a single respect."""
    found = []
    for name, least, most in (("block", 32, 128), ("splits", 1, 64), ("warps", 2, 8)):
        value = getattr(tiling, name)
        found += [replace(tiling, **{name: n}) for n in (value // 2, 2 * value) if least <= n <= most]
    return found + [replace(tiling, stages=n) for n in (tiling.stages - 1, tiling.stages + 1) if n > 1]


def _attention_case(seen: Seen, cache: list[tuple[Tensor, Tensor]], buffers: Buffers) -> FormatCase:
    stack, visible, slots = seen.stack, seen.visible, cache[0][0].shape[1]
    tokens, dim = len(visible.limits), stack.head_dim
    q = buffers.draw(tokens, stack.num_heads, dim)
    used = triton_attention.tiling(tokens, stack.group_size, stack.num_kv_heads, slots, multiprocessors(buffers.device))

    def fits(t: triton_attention.Tiling) -> bool:
        return 2 * dim * (t.rows + 2 * t.stages * t.block) <= _SHARED_BYTES

    calls = {
        name: [partial(triton_attention.attend_visible, q, keys, values, visible, t) for keys, values in cache]
        for name, t in _named(used, fits)
    }
    return FormatCase(f"attention, {seen.name}", tokens, calls, dict.fromkeys(calls, 2 * cache[0][0].nbytes))


def _product_case(matrix: Matrix, buffers: Buffers) -> FormatCase:
    x = buffers.draw(matrix.tokens, matrix.columns)
    weights = [buffers.draw(matrix.rows, matrix.columns) for _ in range(matrix.layers)]
    used = triton_linear.tiling(matrix.tokens, matrix.columns, matrix.rows, multiprocessors(buffers.device))
    run: Callable[..., Tensor] = triton_linear.skinny_parts
    if matrix.gated:  # whose K is never split
        used, run = replace(used, splits=1), triton_linear.gated_linear

    def fits(t: triton_linear.Tiling) -> bool:
        return 2 * t.stages * t.block * (t.rows + max(16, matrix.tokens)) <= _SHARED_BYTES

    calls = {
        name: [partial(run, x, weight, t) for weight in weights]
        for name, t in _named(used, fits)
        if t.splits == 1 or not matrix.gated
    }
    return FormatCase(matrix.title, matrix.tokens, calls, dict.fromkeys(calls, weights[0].nbytes))


def _named(used: AnyTiling, fits: Callable[[AnyTiling], bool]) -> Iterator[tuple[str, AnyTiling]]:
    """The tiling in use and those beside it, by names of their own."""
    yield f"{_name(used)} (in use)", used
    for tiling in neighbours(used):
        if fits(tiling):
            yield _name(tiling), tiling


def _name(t: triton_attention.Tiling | triton_linear.Tiling) -> str:
    return f"{t.rows} x {t.block}, {t.splits} split(s), {t.warps} warps, {t.stages} stages"
