"""Norms, gate, rotation and skinny products against PyTorch's own, in Triton."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.elementwise import add_rms_norm, rms_norm, silu_mul
from flashdrive_node.engine.kernels.linear import gated_linear, skinny_linear
from flashdrive_node.engine.kernels.parts import summed
from flashdrive_node.engine.kernels.rotary import HeadNorms, KeptKeys, norm_rope_write
from support.kernel_inputs import DEVICE, DTYPE, assert_close, draw, integers, seeded

pytest.importorskip("triton", reason="the kernels need the triton package")

CASES = settings(max_examples=12, deadline=None)
EPS = 1e-6


@CASES
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 9), size=st.integers(1, 700))
def test_norms(seed, tokens, size):
    random = seeded(seed)
    x, update, weight = draw(random, tokens, size), draw(random, tokens, size), draw(random, size)
    with forced("triton"):
        normed = rms_norm(x, weight, EPS)
        total, normed_total = add_rms_norm(x, update, weight, EPS)
    assert torch.equal(total, x + update)
    for given_, found in ((x, normed), (total, normed_total)):
        exact = given_.double()
        exact = exact * (exact.square().mean(dim=1, keepdim=True) + EPS).rsqrt() * weight.double()
        assert_close(found, exact, ulps=0.51)  # one rounding


@CASES
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 9), size=st.integers(1, 2100))
def test_gate(seed, tokens, size):
    gate_up = draw(seeded(seed), tokens, 2 * size)
    with forced("triton"):
        found = silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    assert_close(found, functional.silu(gate.double()).to(DTYPE).double() * up.double(), ulps=1.01)


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    heads=st.sampled_from([(2, 2), (8, 2), (12, 4), (9, 3)]),
    dim=st.sampled_from([16, 64, 128]),
    keep=st.booleans(),
)
def test_rotation_and_cache(seed, tokens, heads, dim, keep):
    random, (q_heads, kv_heads) = seeded(seed), heads
    qkv = draw(random, tokens, (q_heads + 2 * kv_heads) * dim)
    norms = HeadNorms(draw(random, dim), draw(random, dim), EPS)
    angles = torch.randn(tokens, dim // 2, generator=random)
    cos = torch.cat((angles.cos(), angles.cos()), dim=1).to(DEVICE, DTYPE)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=1).to(DEVICE, DTYPE)
    slots = torch.randperm(20, generator=random)[:tokens].to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        cache = torch.full((3, kv_heads, 20, dim), 7.0, device=DEVICE, dtype=DTYPE)  # keys, values, kept keys
        kept = KeptKeys(cache[2], slots.flip(0)) if keep else None
        with forced(backend):
            q = norm_rope_write(qkv, norms, cos, sin, cache[0], cache[1], slots, kept)
        results.append((q, cache[0], cache[1], cache[2]))
    (q, keys, values, store), (expected_q, expected_keys, expected_values, expected_store) = results
    assert torch.equal(values, expected_values)
    assert_close(store, expected_store, ulps=1.01)  # the sum of squares in another order
    # An ulp in one of the two members, each of size up to 4, and a rounding more in the CPU's `rotate`.
    assert_close(keys, expected_keys, ulps=3)
    assert_close(q, expected_q, ulps=3)


@CASES
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 20),
    size=st.integers(1, 300),
    out_size=st.integers(1, 300),
)
def test_skinny_products(seed, tokens, size, out_size):
    random = seeded(seed)
    x, weight = draw(random, tokens, size), draw(random, out_size, size)
    with forced("triton"):
        found = skinny_linear(x, weight)
    assert_close(found, x.double() @ weight.double().T, ulps=0.6)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_products_split_along_k(splits):
    from flashdrive_node.engine.kernels import triton_linear

    random = seeded(splits)
    x, weight = draw(random, 7, 200), draw(random, 70, 200)
    found = triton_linear.skinny_linear(x, weight, chosen=triton_linear.Tiling(16, 32, splits, warps=4, stages=2))
    assert_close(found, x.double() @ weight.double().T, ulps=0.6)


@CASES
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 20), size=st.integers(1, 300), out_size=st.integers(1, 150))
def test_gated_products(seed, tokens, size, out_size):
    random = seeded(seed)
    x, weight = draw(random, tokens, size), draw(random, 2 * out_size, size) * size**-0.5
    with forced("triton"):
        found = gated_linear(x, weight)
    gate, up = (x.double() @ weight.double().T).to(DTYPE).double().chunk(2, dim=1)
    # A sum of float32 that lies near the middle of two neighbours may be rounded to either.
    exact = functional.silu(gate).to(DTYPE).double() * up
    assert_close(found, exact, ulps=3)


@pytest.mark.parametrize("splits", [2, 3])
def test_readers_add_up_the_parts_of_a_product(splits):
    """The same to the last bit as with a kernel in between that adds them up."""
    from flashdrive_node.engine.kernels import triton_linear

    random, heads, dim, tokens = seeded(splits), 4, 16, 5
    cut = triton_linear.Tiling(16, 32, splits, warps=4, stages=2)
    x = draw(random, tokens, 200)
    residual, weight, scale = draw(random, tokens, 70), draw(random, 70, 200), draw(random, 70)
    parts = triton_linear.skinny_parts(x, weight, chosen=cut)
    assert parts.shape == (splits, tokens, 70)
    whole = triton_linear.skinny_linear(x, weight, chosen=cut)
    assert torch.equal(summed(parts, DTYPE), whole)
    for backend in ("triton", "reference"):
        with forced(backend):
            pairs = [add_rms_norm(residual, update, scale, EPS) for update in (parts, whole)]
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))

    projection = draw(random, (heads + 2 * 2) * dim, 200)
    norms = HeadNorms(draw(random, dim), draw(random, dim), EPS)
    cos, sin = draw(random, tokens, dim), draw(random, tokens, dim)
    slots = torch.arange(tokens, device=DEVICE) + 3
    for backend in ("triton", "reference"):
        results = []
        for make in (triton_linear.skinny_parts, triton_linear.skinny_linear):
            cache = torch.zeros(2, 2, 20, dim, device=DEVICE, dtype=DTYPE)
            with forced(backend):
                q = norm_rope_write(make(x, projection, chosen=cut), norms, cos, sin, cache[0], cache[1], slots)
            results.append((q, cache))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bad_input_is_refused():
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"norm: rows .* \[3, 8\] .* and \[7\]"):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match="x and update alike"):
        add_rms_norm(x, x[:2], torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"float32 parts of it, are required, found \[3, 8\] .* and \[2, 3, 7\]"):
        add_rms_norm(x, torch.zeros(2, 3, 7), torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"gate: contiguous .* found \[3, 7\]"):
        silu_mul(x[:, :7])
    with pytest.raises(ValueError, match="linear: x"):
        skinny_linear(x, torch.zeros(4, 9))
    cache, norms = torch.zeros(2, 9, 4), HeadNorms(torch.ones(4), torch.ones(4), EPS)
    qkv, angles = torch.zeros(3, 24), torch.zeros(3, 4)
    with pytest.raises(ValueError, match="rotary: contiguous qkv"):
        norm_rope_write(qkv[:, :22], norms, angles, angles, cache, cache, integers([0, 1, 2]).cpu())
    with pytest.raises(ValueError, match="slots must be int64"):
        norm_rope_write(qkv, norms, angles, angles, cache, cache, torch.zeros(3, dtype=torch.int32))
