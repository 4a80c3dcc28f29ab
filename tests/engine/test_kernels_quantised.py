"""Rows for quantised products, and these products, against their references, in Triton."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from flashdrive_node.engine.draft_layers import finish_layer, last_outputs, project_layer
from flashdrive_node.engine.kernels.attention import attend_for, attend_visible
from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.elementwise import add_rms_norm, rms_norm, silu_mul
from flashdrive_node.engine.kernels.linear import apply, gated_project, project, project_parts
from flashdrive_node.engine.kernels.parts import summed
from flashdrive_node.engine.kernels.quantised_linear import (
    FEW_FP8_ROWS,
    Rows,
    add_norm_for,
    norm_for,
    quantised_parts,
    row_format,
    unscaled,
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
from flashdrive_node.engine.kernels.row_formats import QuantisedRows, Rotation, RowFormat, Unscaled
from flashdrive_node.engine.kernels.visibility import up_to
from flashdrive_node.engine.slot_pass import run_at_slots
from flashdrive_node.engine.vision_pass import VisionPass
from flashdrive_node.model.decoder import DecoderLayer, RMSNorm
from flashdrive_node.model.fp8 import E4M3, Fp8Linear, round_rows
from flashdrive_node.model.int4_linear import Int4Linear
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.linear import QuantisedLinear, SideBySide
from flashdrive_node.model.paroquant import ALWAYS, NEVER, ParoLinear
from flashdrive_node.model.quantised_loading import replace_module
from flashdrive_node.model.vision import VisionTower
from support.kernel_inputs import DEVICE, DTYPE, assert_close, draw, seeded
from support.quantised import random_weight
from support.small_models import small_config

tl = pytest.importorskip("triton.language", reason="the kernels need the triton package")
gelu_round = pytest.importorskip("flashdrive_node.engine.kernels.triton_round_rows").gelu_round
layer_norm_round = pytest.importorskip("flashdrive_node.engine.kernels.triton_vision").layer_norm_round
interpreter = pytest.importorskip("triton.runtime.interpreter")

CASES = settings(max_examples=8, deadline=None)
EPS = 1e-6


@pytest.fixture(autouse=True, scope="module")
def _interpreter_rounds() -> Iterator[None]:
    """The interpreter does not carry from the mantissa to the exponent when it rounds to e4m3 (triton 3.7)."""
    convert = interpreter._convert_float

    def corrected(numbers, source, target, rounding):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(numbers, source, target, rounding)
        return torch.from_numpy(numbers.view(np.float32)).to(E4M3).view(torch.uint8).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", corrected)
        yield


def paro(out_size: int, groups: int, seed: int, int8_from: int = ALWAYS, group_size: int = 128) -> ParoLinear:
    """A layer of random integers."""
    return ParoLinear(random_weight(out_size, groups, seed, group_size), int8_from).to(DEVICE)


def rotation(layer: ParoLinear) -> Rotation:
    """What the layer's inputs go through."""
    return Rotation(layer.channel_scales, layer.steps, layer.turns, layer.blocks, layer.packed.group_size)


def int8_form(layer: ParoLinear) -> RowFormat:
    """What its product takes with 8-bit activations."""
    return RowFormat(torch.int8, rotation(layer), layer.packed.group_size)


def assert_rows(found: QuantisedRows, expected: QuantisedRows) -> None:
    """The same but for values half way between two, which fall to one side or the other."""
    assert found.values.dtype == expected.values.dtype
    if expected.scales is None:
        assert found.scales is None
        assert_close(found.values, expected.values, ulps=1.01)
    else:
        assert found.scales is not None
        torch.testing.assert_close(found.scales, expected.scales, rtol=1e-5, atol=0)
        assert_steps(found.values, expected.values)
    if expected.sums is None:
        assert found.sums is None
    else:
        # Of the values as they were found.
        groups = found.values.float().unflatten(1, (len(expected.sums), -1))
        torch.testing.assert_close(found.sums, groups.sum(dim=2).T, rtol=1e-5, atol=1e-3)


def assert_rounded(found: QuantisedRows, given_: Tensor, scale: float | None = None) -> None:
    """Rows of 8-bit floats are the nearest to what is given, which may be off by some steps of its 16-bit type."""
    assert found.scales is not None
    slack = 4 * torch.finfo(given_.dtype).eps
    expected = quantise_reference(given_, RowFormat(E4M3, scale=scale)).scales
    torch.testing.assert_close(found.scales, expected, rtol=slack, atol=0)
    scales = found.scales[:, None].double()
    near = given_.double().clamp(-448 * scales, 448 * scales)
    apart = (found.values.double() * scales - near).abs()
    # Half a step is a sixteenth of a value, and below the normal numbers 2^-10.
    assert bool((apart <= near.abs() * (2**-4 + slack) + scales * 2**-10 * (1 + slack)).all())


def assert_steps(found: Tensor, expected: Tensor) -> None:
    """8-bit values, of which few are a neighbour of the one expected."""
    if found.dtype == torch.int8:
        apart = (found.int() - expected.int()).abs()
    else:
        # In the order of the numbers.
        bits = [t.view(torch.int8).int() for t in (found, expected)]
        keys = [torch.where(b < 0, -(b & 127), b) for b in bits]
        apart = (keys[0] - keys[1]).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) <= 0.01 + 2 / apart.numel()


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
    torch.testing.assert_close(total, x + expected, rtol=1e-2, atol=1e-2)
    assert_rounded(found, rms_norm(total, weight, EPS))


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


def test_many_rows_in_eight_bits() -> None:
    """As a prefill runs them: what the modules give, with scales multiplied in behind the products."""
    torch.manual_seed(0)
    layers = (nn.Linear(64, 96, bias=False), nn.Linear(48, 64, bias=False))
    gate_up, down = (Fp8Linear(dense.requires_grad_(False).to(DEVICE, torch.bfloat16)) for dense in layers)
    norm = RMSNorm(64, EPS).requires_grad_(False).to(DEVICE, torch.bfloat16)
    norm.weight.fill_(1.0)
    x = torch.randn(FEW_FP8_ROWS + 1, 64, generator=seeded(1)).to(DEVICE, torch.bfloat16)
    with forced("triton"):
        rows = quantise(x, RowFormat(E4M3))
        assert unscaled(replace(rows, dtype=torch.float16), gate_up) is None  # whose range is too small
        gated = gated_project(rows, gate_up, down)
        update = project_parts(gated, down)
        assert isinstance(update, Unscaled)
        plain = gated_project(rows, gate_up, layers[1])  # a reader that takes 16 bits
        total, hidden = add_norm_for(gate_up, x, update, norm)
        same, last = add_norm_for(None, x, update, norm)
    assert isinstance(gated, QuantisedRows)
    assert isinstance(plain, Tensor)
    assert isinstance(hidden, QuantisedRows)
    expected = silu_mul(gate_up(x))
    assert_rounded(gated, expected)
    torch.testing.assert_close(plain, expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(total, x + down(expected), rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(same, total, rtol=1e-2, atol=1e-2)
    assert_rounded(hidden, rms_norm(total, norm.weight, EPS))
    assert isinstance(last, Tensor)
    torch.testing.assert_close(last, rms_norm(same, norm.weight, EPS), rtol=2e-2, atol=2e-2)


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


def exact(rows: QuantisedRows, layer: ParoLinear) -> Tensor:
    """In float64, of the rows' own values."""
    matrix = layer.matrix
    codes = torch.cat([layer.codes & 15, layer.codes >> 4], dim=2).double() - layer.zeros[..., None].double()
    weight = (codes * layer.scales[..., None].double()).transpose(0, 1).flatten(1)
    assert weight.shape == matrix.shape
    scale = 1.0 if rows.scales is None else rows.scales[:, None].double()
    return rows.values.double() @ weight.T * scale


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 2, 7, 16, 17, 40]),
    out_size=st.integers(1, 150),
    groups=st.integers(1, 9),
    group_size=st.sampled_from([64, 128]),
    int8=st.booleans(),
)
def test_products_with_four_bits(seed, tokens, out_size, groups, group_size, int8) -> None:
    layer = paro(out_size, groups, seed, ALWAYS if int8 else NEVER, group_size)
    x = draw(seeded(seed), tokens, groups * group_size)
    rows = quantise_reference(x, RowFormat(torch.int8 if int8 else DTYPE, rotation(layer), group_size))
    expected = exact(rows, layer)
    with forced("triton"):
        found = quantised_parts(rows, layer)
    # Sums of a group are exact with int8; those of the groups are in float32, and rounded once.
    largest = float(expected.abs().max()) + 1
    assert_close(summed(found, DTYPE).double() / largest, expected / largest, ulps=0.6)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("block", [16, 64])
def test_tilings_of_four_bits(splits: int, block: int) -> None:
    from flashdrive_node.engine.kernels import triton_int4_linear
    from flashdrive_node.engine.kernels.triton_linear import Tiling

    layer = paro(90, 4, seed=splits)
    rows = quantise_reference(draw(seeded(3), 70, 512), int8_form(layer))
    found = triton_int4_linear.int4_parts(rows, layer.packed, Tiling(64, block, splits, warps=4, stages=2))
    assert found.shape == ((70, 90) if splits == 1 else (splits, 70, 90))
    expected = exact(rows, layer)
    largest = float(expected.abs().max())
    assert_close(summed(found, DTYPE).double() / largest, expected / largest, ulps=0.6)


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 3, 8, 15]),
    size=st.integers(1, 700),
    out_size=st.integers(1, 150),
    bias=st.booleans(),
)
def test_products_with_eight_bits(seed, tokens, size, out_size, bias) -> None:
    random = seeded(seed)
    dense = nn.Linear(size, out_size, bias=bias).requires_grad_(False).to(DEVICE, DTYPE)
    x = draw(random, tokens, size)
    fp8 = Fp8Linear(dense)
    q, scale = round_rows(x)
    expected = (q.double() @ fp8.weight_fp8.double().T) * scale.double() * fp8.row_scales.double().T
    with forced("triton"):
        found = project(QuantisedRows(q, scale[:, 0], None, DTYPE), fp8)
    if bias:
        expected = expected.to(DTYPE).double() + dense.bias.double()
    # Two roundings, and what Hopper's matrix units lose: sums of e4m3 products keep 14 bits behind the largest of them.
    assert_close(found, expected, ulps=1.1 if DEVICE.type == "cpu" else 1.6)
    if not bias:
        int8 = Int8Linear(dense)
        with forced("triton"):
            found = project(x, int8)
        assert_close(found, x.double() @ int8.dequantised().double().T, ulps=0.65)  # x is rounded to 15 bits


def quantised(kind: str, out_size: int, seed: int) -> QuantisedLinear:
    """A layer on 256 channels."""
    if kind in ("fp8", "fp8_static", "int4"):
        torch.manual_seed(seed)
        dense = nn.Linear(256, out_size, bias=kind == "int4").requires_grad_(False).to(DEVICE, DTYPE)
        return Int4Linear(dense) if kind == "int4" else Fp8Linear(dense, None if kind == "fp8" else 6.0)
    if kind == "rotations of their own":
        return SideBySide([paro(out_size // 2, 2, seed + part) for part in range(2)])
    return paro(out_size, 2, seed, NEVER if kind == "w4a16" else ALWAYS)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("rotations of their own", 5), *product(["fp8", "fp8_static", "int4", "w4a8", "w4a16"], [5, 66])],
)
def test_a_layer_is_what_its_module_is(kind: str, tokens: int) -> None:
    """Norm, gate/up, gate and down: kernel by kernel, and module by module."""
    random = seeded(7)
    x, update = draw(random, tokens, 256), draw(random, tokens, 256)
    norm = RMSNorm(256, EPS).requires_grad_(False).to(DEVICE, DTYPE)
    norm.weight.copy_(draw(random, 256))
    gate_up, down = quantised(kind, 512, seed=8), quantised(kind, 64, seed=9)
    results = []
    for backend in ("triton", "reference"):
        with forced(backend):
            rows = norm_for(gate_up, x, norm)
            total, hidden = add_norm_for(gate_up, x, update, norm)
            results.append((total, project(rows, gate_up), project(gated_project(hidden, gate_up, down), down)))
            assert isinstance(rows, Tensor) is (backend == "reference" or kind == "rotations of their own")
    for found, expected in zip(*results, strict=True):
        # Values that fall to another side when they are rounded, in the second product those of the first among them;
        # in the bfloat16 of GPUs, whose steps are an eighth of those of e4m3 and more, it is more of them.
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert float(error) < (1e-2 if DEVICE.type == "cpu" else 2e-2)


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_layer_with_bias(tokens: int) -> None:
    """Of the vision tower: 8-bit floats, and a bias behind the product."""
    torch.manual_seed(3)
    dense = nn.Linear(96, 80).requires_grad_(False).to(DEVICE, DTYPE)
    layer, x = Fp8Linear(dense), draw(seeded(4), tokens, 96)
    with forced("triton"):
        found = apply(layer, x)
    assert_close(found, layer(x), ulps=3)
    assert torch.equal(apply(dense, x), dense(x))


@pytest.mark.parametrize("largest_input", [None, 4.0])
@pytest.mark.parametrize("slots", [100, 320])  # which one program reads, and which several share
def test_attention_for_a_layer_in_eight_bits(slots: int, largest_input: float | None) -> None:
    random, tokens = seeded(slots), 3
    q = draw(random, tokens, 6, 16)
    keys, values = draw(random, 3, slots, 16), draw(random, 3, slots, 16)
    visible = up_to(torch.arange(slots - tokens, slots, device=DEVICE))
    reader = Fp8Linear(nn.Linear(96, 8, bias=False).requires_grad_(False).to(DEVICE, DTYPE), largest_input)
    with forced("triton"):
        found, plain = attend_for(reader, q, keys, values, visible), attend_visible(q, keys, values, visible)
        same = attend_for(nn.Linear(96, 8), q, keys, values, visible)
    assert isinstance(found, QuantisedRows)
    assert_rounded(found, plain, reader.input_scale)
    assert isinstance(same, Tensor)
    assert torch.equal(same, plain)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_layers_of_a_drafter(eight_bits: bool) -> None:
    """Kernel by kernel as in a proposal, and module by module as in training."""
    config = replace(small_config().text, hidden_size=64, intermediate_size=96)
    torch.manual_seed(6)
    layer = DecoderLayer(config).requires_grad_(False).to(DEVICE, DTYPE)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    if eight_bits:
        for name in ("qkv", "o_proj", "gate_up", "down"):
            setattr(layer, name, Fp8Linear(layer.get_submodule(name)))
    x, attended = draw(seeded(1), 2, 3, 64), draw(seeded(2), 2, 3, config.q_size)

    def run() -> list[Tensor]:
        return [*project_layer(layer, x), finish_layer(layer, x, attended), last_outputs(config.q_size, layer.qkv, x)]

    expected = run()
    with torch.no_grad(), forced("triton"):
        found = run()
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).double().norm() / other.double().norm()) < (
            2e-2 if eight_bits else 2 * torch.finfo(DTYPE).eps
        )


def test_a_pass_of_the_vision_tower() -> None:
    """Norms and GELU round for the layers that read them; with the mergers, it is what the modules give."""
    config = small_config().vision
    torch.manual_seed(4)
    tower = VisionTower(config).requires_grad_(False).to(DEVICE, DTYPE)
    for name, parameter in tower.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.1 * torch.randn_like(parameter) if "weight" in name else parameter * 0)
    grid = (2 * config.spatial_merge_size, 3 * config.spatial_merge_size)
    pixels = draw(seeded(5), 2 * grid[0] * grid[1], tower.patch_embed.weight.shape[1])
    plain = tower(pixels, [grid, grid])
    for name, module in list(tower.named_modules()):
        if isinstance(module, nn.Linear) and name != "patch_embed":
            replace_module(tower, name, Fp8Linear(module))
    expected = tower(pixels, [grid, grid])
    with forced("triton"):
        found = VisionPass(tower).run(pixels, grid)
    triples = zip(*((f.embeds, *f.deepstack) for f in (found, expected, plain)), strict=True)
    for one, other, unrounded in triples:
        # Values between two of the format fall to either side, which is less than what all the rounding costs.
        cost, apart = (other - unrounded).double().norm(), (one - other).double().norm()
        assert float(cost / unrounded.double().norm()) < 0.08
        assert float((one - unrounded).double().norm()) < 1.2 * float(cost)
        assert float(apart) < 0.8 * float(cost)


def test_a_pass_of_quantised_layers() -> None:
    """Two layers of the decoder with all that stands between the products, streamed into a cache."""
    config = replace(small_config().text, hidden_size=128, intermediate_size=256, num_layers=2)
    torch.manual_seed(1)
    layers = nn.ModuleList(DecoderLayer(config) for _ in range(2)).requires_grad_(False).to(DEVICE, DTYPE)
    norm = RMSNorm(128, EPS).requires_grad_(False).to(DEVICE, DTYPE)
    for parameter in (*layers.parameters(), norm.weight):
        if parameter.ndim == 1:
            parameter.fill_(1.0)
    for i, layer in enumerate(layers):
        for name in ("qkv", "gate_up", "down"):  # the attention's output makes no group
            dense = layer.get_submodule(name)
            weight = random_weight(dense.out_features, dense.in_features // 128, seed=i)
            matrix = weight.matrix._replace(scales=weight.matrix.scales / 16)
            setattr(layer, name, ParoLinear(weight._replace(matrix=matrix)).to(DEVICE))
    x = draw(seeded(2), 5, 128)
    angles = torch.randn(5, config.head_dim // 2, generator=seeded(3)).to(DEVICE)
    cos, sin = torch.cat((angles.cos(),) * 2, 1).to(DTYPE), torch.cat((-angles.sin(), angles.sin()), 1).to(DTYPE)
    slots = torch.arange(5, device=DEVICE)
    visible, results = up_to(slots + 1), []

    def attention(q: Tensor, keys: Tensor, values: Tensor, reader: nn.Module) -> Rows:
        return attend_for(reader, q, keys, values, visible)

    for backend in ("triton", "reference"):
        cache = KVCache(config, 9, DEVICE, DTYPE)
        with forced(backend):
            results.append(run_at_slots(layers, norm, x, (cos, sin), slots, cache, attention))
    found, expected = (result.double() for result in results)
    assert float((found - expected).norm() / expected.norm()) < 2e-2
    assert float(found.std()) > 0.5


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs need a CUDA device")
@pytest.mark.parametrize("kind", ["fp8", "w4a8", "w4a16"])
@pytest.mark.parametrize("tokens", [8, 48, 130])
def test_a_graph_repeats_with_new_inputs(kind: str, tokens: int) -> None:
    layer, random = quantised(kind, 384, seed=1), seeded(2)
    x, norm = draw(random, tokens, 256), RMSNorm(256, EPS).requires_grad_(False).to(DEVICE, DTYPE)
    norm.weight.fill_(1.0)

    def run() -> Tensor:
        return project(norm_for(layer, x, norm), layer)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    x.copy_(draw(random, tokens, 256))
    graph.replay()
    assert torch.equal(found, run())


def test_other_devices_and_sizes_take_the_reference() -> None:
    layer, x = paro(8, 2, seed=1, group_size=32), torch.zeros(2, 64, dtype=DTYPE)
    assert row_format(layer, x) is None  # without Triton
    with forced("triton"):
        assert row_format(layer, x.to(DEVICE)) is None  # groups below those of the matrix units
        assert row_format(paro(8, 1, seed=1), torch.zeros(2, 128)) is None  # float32 keeps PyTorch's precision
        assert project(x.to(DEVICE), layer).shape == (2, 8)


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
