"""Quantised products, and the layers and passes that are made of them, against their references, in Triton."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashdrive_node.engine.draft_layers import finish_layer, last_outputs, project_layer
from flashdrive_node.engine.kernels.attention import attend_for, attend_visible
from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.elementwise import rms_norm, silu_mul
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
)
from flashdrive_node.engine.kernels.rotate_quantise import (
    quantise,
    quantise_reference,
)
from flashdrive_node.engine.kernels.row_formats import QuantisedRows, RowFormat, Unscaled
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
from support.rounded_rows import assert_rounded, int8_form, paro, rotation, torch_rounds
from support.small_models import small_config

pytest.importorskip("triton.language", reason="the kernels need the triton package")

CASES = settings(max_examples=8, deadline=None)
EPS = 1e-6
#: How far sums of e4m3 products may be off, of the sum of their sizes. Hopper's matrix units keep 13 bits behind the
#: largest term of a step: off by up to 4.2e-4 on an H200, and by 1e-7 where every step's sums go to float32 registers.
E4M3_SUMS = 2**-11 if DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE)[0] == 9 else 0.0

interpreter_rounds = pytest.fixture(autouse=True, scope="module")(torch_rounds)


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
    sizes = (q.double().abs() @ fp8.weight_fp8.double().abs().T) * scale.double() * fp8.row_scales.double().T
    off = (found.double() - expected).abs() - E4M3_SUMS * sizes
    assert_close(expected + off.clamp(min=0), expected, ulps=1.1)
    if not bias:
        int8 = Int8Linear(dense)
        with forced("triton"):
            found = project(x, int8)
        assert_close(found, x.double() @ int8.dequantised().double().T, ulps=0.6)


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
    if kind.startswith("fp8") and tokens > FEW_FP8_ROWS:
        # Sums are rounded in front of their scales as well, so at the second rounding to 3 bits some 2 % of the values
        # fall to the other side. What counts is that this is no coarser than the module, seen from what is not rounded.
        exact_mlp = unrounded_mlp(results[0][0], norm, gate_up, down)
        errors = [distance(outputs[2].double(), exact_mlp) for outputs in results]
        assert errors[0] <= 1.05 * errors[1]
        assert distance(results[0][2], results[1][2].double()) < errors[1]
        results = [outputs[:2] for outputs in results]
    for found, expected in zip(*results, strict=True):
        # Values that fall to another side when they are rounded, in the second product those of the first among them.
        assert distance(found, expected.double()) < 1e-2


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def unrounded_mlp(x: Tensor, norm: RMSNorm, gate_up: QuantisedLinear, down: QuantisedLinear) -> Tensor:
    """In float64, with the layers' own weights."""
    x = x.double()
    hidden = x * (x.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
    gate, up = (hidden @ gate_up.dequantised().double().T).chunk(2, dim=-1)
    return (nn.functional.silu(gate) * up) @ down.dequantised().double().T


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
