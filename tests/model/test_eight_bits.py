"""FP8 and int8 layers: rounding, products, and what is read of single rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashdrive_node.model.fp8 import E4M3, Fp8Linear, round_rows
from flashdrive_node.model.int8 import Int8Linear


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
