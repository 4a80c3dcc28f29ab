"""Rows for quantised products against what they are made of, in Triton."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.elementwise import add_rms_norm, rms_norm, silu_mul
from flashdrive_node.engine.kernels.linear import project
from flashdrive_node.engine.kernels.quantised_linear import (
    whole,
)
from flashdrive_node.engine.kernels.rotary import HeadNorms, norm_rope_write
from flashdrive_node.engine.kernels.rotate_quantise import (
    add_norm_quantise,
    gate_quantise,
    norm_quantise,
    quantise,
    quantise_reference,
    turn_reference,
)
from flashdrive_node.engine.kernels.row_formats import RowFormat, Unscaled
from flashdrive_node.model.fp8 import E4M3
from support.kernel_inputs import DEVICE, DTYPE, assert_close, draw, seeded
from support.rounded_rows import assert_rounded, assert_rows, int8_form, paro, rotation, torch_rounds

pytest.importorskip("triton.language", reason="the kernels need the triton package")
gelu_round = pytest.importorskip("flashdrive_node.engine.kernels.triton_round_rows").gelu_round
layer_norm_round = pytest.importorskip("flashdrive_node.engine.kernels.triton_vision").layer_norm_round

CASES = settings(max_examples=8, deadline=None)
EPS = 1e-6

interpreter_rounds = pytest.fixture(autouse=True, scope="module")(torch_rounds)


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 4),
    groups=st.integers(1, 5),
    kind=st.sampled_from(["int8", "16 bits"]),
    source=st.sampled_from(["plain", "norm", "sum", "parts", "gate"]),
)
def test_turned_rows(seed: int, tokens: int, groups: int, kind: str, source: str) -> None:
    random, size = seeded(seed), 128 * groups
    form = RowFormat(torch.int8 if kind == "int8" else DTYPE, rotation(paro(8, groups, seed)), 128)
    assert_from(source, form, random, tokens, size)


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 5),
    size=st.integers(1, 700),
    source=st.sampled_from(["plain", "norm", "sum", "parts", "gate"]),
    scale=st.sampled_from([None, 0.002]),
)
def test_rows_in_eight_bit_floats(seed: int, tokens: int, size: int, source: str, scale: float | None) -> None:
    assert_from(source, RowFormat(E4M3, scale=scale), seeded(seed), tokens, size)


def assert_from(source: str, form: RowFormat, random: torch.Generator, tokens: int, size: int) -> None:
    """Rows made of what stands in front of them are those of the same in two steps."""
    x, weight = draw(random, tokens, size), draw(random, size)
    with forced("triton"):
        if source == "plain":
            found, given_ = quantise(x, form), x
        elif source == "norm":
            found, given_ = norm_quantise(x, weight, EPS, form), rms_norm(x, weight, EPS)
        elif source == "gate":
            gate_up = draw(random, tokens, 2 * size)
            found, given_ = gate_quantise(gate_up, form), silu_mul(gate_up)
        else:
            update = torch.randn(3, tokens, size, generator=random).to(DEVICE)
            update = update if source == "parts" else update[0].to(DTYPE)
            (total, found), (expected_total, given_) = (
                add_norm_quantise(x, update, weight, EPS, form),
                add_rms_norm(x, update, weight, EPS),
            )
            assert torch.equal(total, expected_total)
    assert_rows(found, quantise_reference(given_, form))


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 4),
    size=st.integers(2, 700),
    source=st.sampled_from(["norm", "sum", "gelu"]),
    scale=st.sampled_from([None, 0.002]),
)
def test_rows_of_the_vision_tower(seed: int, tokens: int, size: int, source: str, scale: float | None) -> None:
    """Layer norms and GELU give what the reference rounds of what they are without rounding."""
    random, form = seeded(seed), RowFormat(E4M3, scale=scale)
    x, update = draw(random, tokens, size), draw(random, tokens, size)
    norm = nn.LayerNorm(size, EPS).requires_grad_(False).to(DEVICE, DTYPE)
    norm.weight.copy_(draw(random, size))
    norm.bias.copy_(draw(random, size))
    with forced("triton"):
        if source == "gelu":
            found, given_ = gelu_round(x, form), functional.gelu(x, approximate="tanh")
        elif source == "norm":
            found, given_ = layer_norm_round(x, None, norm.weight, norm.bias, EPS, form)[1], norm(x)
        else:
            total, found = layer_norm_round(x, update, norm.weight, norm.bias, EPS, form)
            assert torch.equal(total, x + update)
            given_ = norm(total)
    assert_rounded(found, given_, scale)


def random_unscaled(random: torch.Generator, tokens: int, size: int) -> tuple[Unscaled, Tensor]:
    """Sums in front of their scales, and what these make of them."""
    sums = (1000 * torch.randn(tokens, size, generator=random)).bfloat16().to(DEVICE)
    token_scales, row_scales = (torch.rand(n, generator=random).to(DEVICE) / 30 for n in (tokens, size))
    whole_ = (sums.float() * token_scales[:, None] * row_scales).bfloat16()
    return Unscaled(sums, token_scales, row_scales[:, None]), whole_


@CASES
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 4), size=st.integers(1, 300))
@example(seed=1008, tokens=3, size=156)  # a product of -2.14 and a sum next to it, both cut off
def test_scales_of_a_product_are_multiplied_in(seed: int, tokens: int, size: int) -> None:
    random, form = seeded(seed), RowFormat(E4M3)
    product, expected = random_unscaled(random, tokens, 2 * size)
    with forced("triton"):
        found = gate_quantise(product, form)
    assert found.dtype == torch.bfloat16
    assert_rounded(found, silu_mul(expected))
    product, expected = random_unscaled(random, tokens, size)
    assert torch.equal(whole(product, torch.bfloat16), expected)
    x, weight = (torch.randn(*shape, generator=random).bfloat16().to(DEVICE) for shape in ((tokens, size), (size,)))
    with forced("triton"):
        total, found = add_norm_quantise(x, product, weight, EPS, form)
    # The interpreter cuts bfloat16 off: a step of the product, which may be larger than the sum, and one of the sum.
    sums = x + expected
    steps = step(expected) + step(torch.maximum(total.abs(), sums.abs()))
    assert bool(((total.float() - sums.float()).abs() <= steps).all())
    assert_rounded(found, rms_norm(total, weight, EPS))


def step(values: Tensor) -> Tensor:
    """From bfloat16 values to the next larger ones, float32."""
    _, exponents = torch.frexp(values.float())
    return torch.ldexp(torch.ones_like(values, dtype=torch.float32), exponents - 8)


def test_scales_of_heads_are_multiplied_in() -> None:
    random, dtype = seeded(3), torch.bfloat16
    product, expected = random_unscaled(random, 5, 4 * 16)  # two heads of queries, one of keys, one of values
    cos, sin = (torch.rand(5, 16, generator=random).to(DEVICE, dtype) for _ in range(2))
    norms = HeadNorms(*(torch.rand(16, generator=random).to(DEVICE, dtype) for _ in range(2)), EPS)
    slots, results = torch.arange(5, device=DEVICE), []
    for backend, qkv in (("triton", product), ("reference", product), ("triton", expected)):
        keys, values = (torch.zeros(1, 6, 16, device=DEVICE, dtype=dtype) for _ in range(2))
        with forced(backend):
            results.append((norm_rope_write(qkv, norms, cos, sin, keys, values, slots), keys, values))
    for ours, reference, scaled in zip(*results, strict=True):
        torch.testing.assert_close(ours, scaled, rtol=1e-2, atol=1e-2)  # the interpreter cuts bfloat16 off
        torch.testing.assert_close(ours, reference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("group_size", [64, 128])
def test_steps_and_matrices_turn_alike(group_size: int) -> None:
    layer = paro(8, 3, seed=4, group_size=group_size)
    x = draw(seeded(5), 70, 3 * group_size)
    expected = layer.rotated(x)
    torch.testing.assert_close(turn_reference(x, rotation(layer)), expected, rtol=0, atol=1e-5)
    form = int8_form(layer)
    with forced("triton"):
        many = quantise(x, form)  # by matrices
    assert_rows(many, quantise_reference(x, form))
    wrong = (many.values.float() * many.scales[:, None] - expected).abs() / many.scales[:, None]  # type: ignore[index]
    assert float(wrong.max()) < 0.51


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about inf - inf
@pytest.mark.parametrize("tokens", [3, 66])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_row_that_is_no_number_spoils_itself_alone(tokens: int, value: float) -> None:
    layer = paro(16, 2, seed=1)
    x = draw(seeded(2), tokens, 256)
    expected = layer(x)
    x[1, 7] = value
    with forced("triton"):
        rows = quantise(x, int8_form(layer))
        found = project(rows, layer)
    assert rows.scales is not None
    assert bool(rows.scales[1].isnan())
    assert int(rows.values[1].abs().max()) == 0
    assert bool(found[1].isnan().all())
    others = torch.arange(tokens, device=DEVICE) != 1
    assert_close(found[others], expected[others], ulps=16)


def test_rows_of_zeros_and_of_the_largest_numbers() -> None:
    layer = paro(16, 2, seed=1)
    x = torch.zeros(2, 256, device=DEVICE, dtype=DTYPE)
    x[1] = min(torch.finfo(DTYPE).max / 4, 1e30)
    with forced("triton"):
        rows = quantise(x, int8_form(layer))
    assert rows.scales is not None
    assert bool(rows.scales.isfinite().all())
    assert int(rows.values[0].abs().max()) == 0
    assert int(rows.values[1].abs().max()) == 127


def test_bad_input_is_refused() -> None:
    layer = paro(8, 2, seed=1)
    x = torch.zeros(3, 256, dtype=DTYPE, device=DEVICE)
    with pytest.raises(ValueError, match=r"a rotation of 128 channels in groups of 128 is required, found one of 256"):
        quantise(x[:, :128], int8_form(layer))
    with pytest.raises(ValueError, match=r"whole groups of a power of two are required, found 256 in groups of 96"):
        quantise(x, RowFormat(torch.int8, group_size=96))
    with pytest.raises(ValueError, match=r"quantise: rows \[M, K\] for values of int8.*found .* for torch.float64"):
        quantise(x, RowFormat(torch.float64))
    with forced("triton"), pytest.raises(ValueError, match="x and update alike"):
        add_norm_quantise(x, x[:2], x[0], EPS, RowFormat(E4M3))
    with forced("triton"), pytest.raises(ValueError, match=r"sums \[2, 3\] of the groups are required, found None"):
        project(quantise(x, RowFormat(torch.int8)), layer)
