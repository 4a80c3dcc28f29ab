"""Kernels of the vision tower and of ageing frames against PyTorch's own, in Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flashdrive_node.engine.kernels.ageing import age, age_reference, chained
from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.patches import Taps, frame_patches
from flashdrive_node.engine.kernels.vision import add_layer_norm, gelu_linear, layer_norm, rotate_queries_and_keys
from flashdrive_node.model.images import integer_weights, patch_rows
from flashdrive_node.model.presets import alpamayo_1_5_10b
from support.kernel_inputs import DEVICE, DTYPE, assert_close, draw, seeded

pytest.importorskip("triton", reason="the kernels need the triton package")

CASES = settings(max_examples=12, deadline=None)
EPS = 1e-6


@CASES
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 9), size=st.integers(2, 700))
def test_layer_norms(seed, tokens, size):
    random = seeded(seed)
    x, update, weight, bias = (draw(random, *shape) for shape in ((tokens, size), (tokens, size), (size,), (size,)))
    with forced("triton"):
        normed = layer_norm(x, weight, bias, EPS)
        total, normed_total = add_layer_norm(x, update, weight, bias, EPS)
    assert torch.equal(total, x + update)
    for given_, found in ((x, normed), (total, normed_total)):
        exact = functional.layer_norm(given_.double(), (size,), weight.double(), bias.double(), EPS)
        assert_close(found, exact, ulps=0.52)  # one rounding


@CASES
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 5), heads=st.integers(1, 5), half=st.integers(1, 40))
def test_rotation_in_place(seed, tokens, heads, half):
    random = seeded(seed)
    qkv = draw(random, tokens, 3 * heads * 2 * half)
    angles = torch.rand(tokens, half, generator=random).to(DEVICE) * 6
    cos, sin = torch.cat((angles.cos(), angles.cos()), 1), torch.cat((-angles.sin(), angles.sin()), 1)
    with forced("reference"):
        expected = rotate_queries_and_keys(qkv.clone(), heads, cos, sin)
    with forced("triton"):
        found = rotate_queries_and_keys(qkv, heads, cos, sin)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b.double(), ulps=1.0)
    assert torch.equal(found[2], expected[2])


def test_gelu_behind_a_product():
    random = seeded(0)
    x, weight, bias = draw(random, 5, 64), draw(random, 48, 64) / 8, draw(random, 48)
    exact = functional.gelu(functional.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    assert_close(gelu_linear(x, weight, bias), exact, ulps=4)


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(20, 45),
    width=st.integers(20, 45),
    pixels=st.sampled_from([1024, 2500]),
    layout=st.sampled_from(["rows of pixels", "planes", "stretch of wider frames"]),
    hard=st.booleans(),
)
def test_patches_of_frames(seed, height, width, pixels, layout, hard):
    """Bit for bit those of the native kernel on the CPU, on which hard edges overshoot most."""
    config = replace(alpamayo_1_5_10b(), min_pixels=pixels // 2, max_pixels=pixels)
    frames = torch.randint(
        0, 256, (1 if pixels > 2000 else 2, height, width, 3), generator=seeded(seed), dtype=torch.uint8
    )
    if hard:
        frames = (frames > 127).to(torch.uint8) * 255
    expected, grid = patch_rows(frames.permute(0, 3, 1, 2), config, DTYPE)
    given_ = frames.to(DEVICE).permute(0, 3, 1, 2)
    if layout == "planes":
        given_ = given_.contiguous()
    elif layout == "stretch of wider frames":
        given_ = functional.pad(given_, (3, 5))[..., 3:-5]
    with forced("triton"):
        found, found_grid = frame_patches(given_, config, DTYPE)
    assert found_grid == grid
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(("size_in", "size_out"), [(1080, 320), (1920, 576), (160, 320), (37, 64), (64, 64), (3, 32)])
def test_taps_are_the_weights_without_zeros(size_in, size_out):
    matrix, bits = integer_weights(size_in, size_out)
    found = Taps(size_in, size_out, torch.device("cpu"))
    assert found.bits == bits
    for row, first, weights in zip(matrix, found.first.tolist(), found.weights.T.numpy(), strict=True):
        inside = weights[: size_in - first]
        assert (row[first : first + len(inside)] == inside).all()
        assert row.sum() == weights.sum()


#: Where frames of two cameras go: one new frame, two, one that came late, none in the second camera.
MOVES = [
    [(1, 0), (2, 1), (3, 2), (5, 4), (6, 5), (7, 6)],
    [(2, 0), (3, 1), (5, 4), (6, 5), (7, 6)],
    [(0, 1), (1, 2), (2, 3)],
    [(1, 0), (2, 3)],
]


@pytest.mark.parametrize("moves", MOVES, ids=str)
def test_ageing_moves_and_rotates(moves):
    random, tokens = seeded(1), [3] * 4 + [5] * 4
    offsets = [sum(tokens[:i]) for i in range(8)]
    chains = chained(moves, tokens, offsets)
    assert sorted(i for i in chains.chains.flatten().tolist() if i >= 0) == list(range(len(chains.source)))
    layers, heads, places, slots, dim = 2, 3, sum(tokens) + 1, 60, 24
    store = draw(random, layers, heads, places, dim)
    keys, values = draw(random, layers, heads, slots, dim), draw(random, layers, heads, slots, dim)
    slot_of = torch.randperm(slots, generator=random)[: sum(tokens)].to(DEVICE)
    rotation = draw(random, len(chains.source), dim), draw(random, len(chains.source), dim)
    moved = type(chains)(*(t.to(DEVICE) for t in (chains.source, chains.target, chains.chains)))
    expected = [t.clone() for t in (store, keys, values)]
    age_reference(*expected, slot_of, moved, *rotation)
    with forced("triton"):
        age(store, keys, values, slot_of, moved, rotation)
    assert torch.equal(store, expected[0])
    assert torch.equal(values, expected[2])
    assert_close(keys, expected[1].double(), ulps=4)  # on a CPU the reference rounds once more
    written = torch.zeros(slots, dtype=torch.bool, device=DEVICE)
    written[slot_of[moved.target]] = True
    assert torch.equal(keys[:, :, ~written], expected[1][:, :, ~written])


def test_arguments_are_checked():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="weight and bias"):
        layer_norm(x, x[0], x[0, :4], EPS)
    with pytest.raises(ValueError, match="x and update alike"):
        add_layer_norm(x, x[:1], x[0], x[0], EPS)
    with pytest.raises(ValueError, match="contiguous qkv"):
        rotate_queries_and_keys(x, 1, x[:, :4], x[:, :4])
    with pytest.raises(ValueError, match="ageing: rotations"):
        age(x[None, None], x[None, None], x[None, None], x[0], chained([(1, 0)], [1, 1], [0, 1]), (x, x))
