"""FP8, int8 and unrotated int4 layers: rounding, products, static scales, and what is read of single rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.fp8 import E4M3, Fp8Linear, round_rows
from flashdrive_node.model.int4 import dequantise, quantise
from flashdrive_node.model.int4_linear import Int4Linear
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.linear import RowwiseLinear


def dense(rows: int, columns: int, seed: int, bias: bool = False) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=bias)
    layer.weight.data = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 2, rows)[:, None]
    if bias:
        layer.bias.data = torch.randn(rows, generator=generator)
    return layer.requires_grad_(False)


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_rows_use_the_whole_range_and_lose_a_sixteenth_at_most(rows: int, columns: int, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 1e3
    q, scale = round_rows(x)
    assert q.dtype == E4M3
    assert torch.equal(q.float().abs().amax(dim=1), torch.full((rows,), 448.0))
    # Three bits of mantissa; below the smallest normal number the steps are equal.
    bound = torch.maximum(x.abs() / 16, scale * 2**-10)
    assert bool(((q.float() * scale - x).abs() <= bound * 1.001).all())


def test_rows_of_nothing_stay_nothing() -> None:
    q, scale = round_rows(torch.zeros(2, 8))
    assert bool(torch.isfinite(scale).all())
    assert q.float().abs().max() == 0


@pytest.mark.parametrize("bias", [False, True])
def test_fp8_product(bias: bool) -> None:
    layer = dense(48, 96, seed=1, bias=bias)
    fp8 = Fp8Linear(layer)
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2))
    q, scale = round_rows(x)
    expected = (q.double() * scale.double()) @ fp8.dequantised().double().T
    if layer.bias is not None:
        expected = expected + layer.bias.double()
    torch.testing.assert_close(fp8(x).double(), expected, atol=1e-4, rtol=1e-5)
    # Each factor is off by a sixteenth at most.
    bound = 0.13 * x.abs() @ layer.weight.abs().T + 1e-5
    assert bool(((fp8(x) - layer(x)).abs() <= bound).all())
    assert fp8.nbytes < 0.6 * layer.weight.nbytes / 2 + 4 * 48 * 2
    assert fp8(x.bfloat16()).dtype == torch.bfloat16


def test_int8_product_and_rows() -> None:
    layer = dense(40_000, 16, seed=3)
    int8 = Int8Linear(layer)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(int8(x), x @ int8.dequantised().T, atol=1e-4, rtol=1e-5)
    error = (int8.dequantised() - layer.weight).abs().amax(dim=1)
    assert bool((error <= 0.501 * int8.row_scales).all())
    ids = torch.tensor([0, 17, 39_999])
    assert torch.equal(int8.rows(ids), int8.dequantised()[ids])


def test_int8_takes_no_bias() -> None:
    with pytest.raises(ValueError, match="without bias"):
        Int8Linear(dense(4, 4, seed=5, bias=True))


def test_static_scale_is_one_for_all_tokens() -> None:
    layer = dense(48, 96, seed=6, bias=True)
    static = Fp8Linear(layer, largest_input=2.0)
    assert (static.format, Fp8Linear(layer).format) == ("fp8_static", "fp8")
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(7)).clamp(-2, 2)
    q, scale = static.rounded(x)
    assert torch.equal(scale, torch.full((5, 1), 4.0 / 448))
    assert layer.bias is not None
    expected = (q.float() * scale) @ static.dequantised().T + layer.bias
    torch.testing.assert_close(static(x), expected, atol=1e-3, rtol=1e-5)
    # As good as a scale per token, as long as nothing is far beyond what was met.
    own, shared = ((module(x) - layer(x)).norm() for module in (Fp8Linear(layer), static))
    assert shared < 1.1 * own
    assert bool(torch.isfinite(static(1e6 * x)).all())
    with pytest.raises(InputError, match="a largest input above 0 is required, found 0"):
        Fp8Linear(layer, largest_input=0.0)


def test_int4_product_and_rows() -> None:
    layer = dense(40, 256, seed=8)
    int4 = Int4Linear(layer)
    assert torch.equal(int4.dequantised(), dequantise(quantise(layer.weight, 128)))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(int4(x), x @ int4.dequantised().T, atol=1e-3, rtol=1e-4)
    assert int4.nbytes < 0.54 * layer.weight.numel()
    ids = torch.tensor([39, 0])
    assert torch.equal(int4.rows(ids), int4.dequantised()[ids])
    with pytest.raises(InputError, match="columns in groups of 128 are required, found 96"):
        Int4Linear(dense(8, 96, seed=10))


@given(st.sampled_from([Fp8Linear, Int8Linear, Int4Linear]), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_filled_in_parts_is_filled_at_once(kind: type[RowwiseLinear], rows: int, seed: int) -> None:
    layer = dense(rows, 128, seed=seed)
    with torch.device("meta"):
        room = torch.nn.Linear(128, rows, bias=False)
    filled = kind(room).to_empty(device="cpu")
    for first, part in zip(range(0, rows, 7), layer.weight.split(7), strict=True):
        filled.fill(first, part)
    assert all(torch.equal(a, b) for a, b in zip(filled.buffers(), kind(layer).buffers(), strict=True))
