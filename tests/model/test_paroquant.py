"""Rotations, 4-bit groups and the layers made of them, against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.givens import (
    pair_index,
    random_pairs,
    rotate_by_blocks,
    rotate_pairs,
    rotate_pairs_back,
    rotation_blocks,
    rotation_steps,
)
from flashdrive_node.model.int4 import (
    dequantise,
    pack_bytes,
    pack_groups,
    quantise,
    quantise_with,
    unpack_bytes,
    unpack_groups,
)
from flashdrive_node.model.packings import pack_words, unpack_words
from flashdrive_node.model.paroquant import ALWAYS, MAX_CHANNEL_SCALE, NEVER, ParoLinear, ParoWeight
from support.quantised import random_weight


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotated_by_hand(x: torch.Tensor, weight: ParoWeight, size: int = 128) -> torch.Tensor:
    """One channel pair after the other, in float64."""
    y = x.double() * weight.channel_scales.double()
    for pairs, angles in zip(weight.pairs.tolist(), weight.angles.tolist(), strict=True):
        for t, angle in enumerate(angles):
            first = 2 * t // size * size
            i, j = first + pairs[2 * t], first + pairs[2 * t + 1]
            c, s = math.cos(angle), math.sin(angle)
            y[:, i], y[:, j] = c * y[:, i] + s * y[:, j], c * y[:, j] - s * y[:, i]
    return y


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 16, 128]), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_turning_there_and_back_is_nothing(rows: int, groups: int, size: int, seed: int) -> None:
    g = generator(seed)
    x = torch.randn(rows, groups * size, generator=g, dtype=torch.float64)
    index = pair_index(random_pairs(groups * size, 8, size, g), size)
    angles = torch.randn(8, groups * size // 2, generator=g, dtype=torch.float64)
    turned = rotate_pairs(x, index, angles)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate_pairs_back(turned, index, angles), x)
    torch.testing.assert_close(rotate_by_blocks(x, rotation_blocks(index, angles, size)), turned)


def test_rotation_is_the_rule_pair_by_pair() -> None:
    weight = random_weight(8, 2, seed=1)
    x = torch.randn(3, 256, generator=generator(2))
    layer, expected = ParoLinear(weight), rotated_by_hand(x, weight)
    torch.testing.assert_close(layer.rotated(x).double(), expected, atol=1e-5, rtol=1e-5)
    # Two numbers of bfloat16 hold the blocks to 2^-17.
    tolerance = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(layer.rotated_at_once(x[:, None]).double(), expected[:, None], atol=tolerance, rtol=0)


@pytest.mark.parametrize("damage", ["repeated", "out of range", "odd width"])
def test_pairs_that_are_none(damage: str) -> None:
    pairs = random_pairs(256, 8, 128, generator(0))
    if damage == "repeated":
        pairs[3, 5] = pairs[3, 6]
    elif damage == "out of range":
        pairs[3, 5] = 128
    else:
        pairs = pairs[:, :200]
    with pytest.raises(InputError, match="pairs"):
        pair_index(pairs, 128)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_packed_integers_come_back(rows: int, eights: int, seed: int) -> None:
    codes = torch.randint(16, (rows, 8 * eights), generator=generator(seed), dtype=torch.uint8)
    assert torch.equal(unpack_bytes(pack_bytes(codes)), codes)
    assert torch.equal(unpack_words(pack_words(codes)), codes)


@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([2, 16, 128]), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_order_of_a_product_holds_the_same_integers(rows: int, groups: int, size: int, seed: int) -> None:
    matrix = random_weight(rows, groups, seed, size).matrix
    packed = pack_groups(matrix)
    assert packed.shape == matrix.shape
    assert packed.group_size == size
    assert all(torch.equal(a, b) for a, b in zip(unpack_groups(packed), matrix, strict=True))
    channel, codes = seed % (groups * size), unpack_bytes(matrix.codes)
    byte = packed.codes[channel // size, :, channel % (size // 2)]
    assert torch.equal(byte >> 4 if channel % size >= size // 2 else byte & 15, codes[:, channel])


@given(st.integers(1, 8), st.integers(1, 3), st.sampled_from([2, 16, 128]), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_steps_of_a_rotation_are_its_order(rounds: int, groups: int, size: int, seed: int) -> None:
    index = pair_index(random_pairs(groups * size, rounds, size, generator(seed)), size)
    steps = rotation_steps(index, size)
    first = torch.arange(groups * size) // size * size
    place = torch.arange(groups * size)
    for row, order in zip(steps, index, strict=False):
        place = place[first + row.long()]
        assert torch.equal(place, order.long())
    assert torch.equal(first + steps[-1].long(), place)


@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([2, 32, 128]), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_rounding_is_to_the_nearest_code(rows: int, groups: int, size: int, seed: int) -> None:
    weight = torch.randn(rows, groups * size, generator=generator(seed))
    matrix = quantise(weight, size)
    error = (dequantise(matrix) - weight).abs().unflatten(1, (groups, size))
    # Half a step, and half a step more at an end of the range that a rounded zero point moved.
    assert bool((error <= 1.001 * matrix.scales[..., None].float()).all())
    again = quantise_with(dequantise(matrix), matrix.scales.float(), matrix.zeros.float())
    assert torch.equal(again.codes, matrix.codes)


def test_constant_groups_and_values_that_cannot_be_rounded() -> None:
    assert dequantise(quantise(torch.zeros(2, 128), 128)).abs().max() == 0
    with pytest.raises(InputError, match="finite"):
        quantise(torch.full((2, 128), torch.inf), 128)
    with pytest.raises(InputError, match=r"groups of 128.*\[2, 100\]"):
        quantise(torch.zeros(2, 100), 128)


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_layer_is_the_product_with_its_own_matrix(tokens: int, eights: int, groups: int, seed: int) -> None:
    weight = random_weight(8 * eights, groups, seed)
    layer = ParoLinear(weight, NEVER)
    x = torch.randn(tokens, 128 * groups, generator=generator(seed + 1))
    expected = x.double() @ layer.dequantised().double().T
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)


def test_eight_bit_activations_are_integer_arithmetic() -> None:
    weight = random_weight(16, 2, seed=5)
    layer = ParoLinear(weight, ALWAYS)
    x = torch.randn(5, 256, generator=generator(6))
    turned = layer.rotated(x)
    scale = turned.abs().amax(dim=1, keepdim=True) / 127
    q = (turned / scale).round().long()
    codes = unpack_bytes(weight.matrix.codes).long().unflatten(1, (2, 128))
    sums = torch.einsum("mgk,ngk->mng", q.unflatten(1, (2, 128)), codes - weight.matrix.zeros[..., None].long())
    expected = (sums.double() * weight.matrix.scales.double()).sum(-1) * scale.double()
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=1e-6)
    error = (layer(x) - ParoLinear(weight, NEVER)(x)).norm() / layer(x).norm()
    assert 1e-4 < error < 2e-2
    assert torch.equal(layer(torch.zeros(2, 256)), torch.zeros(2, 16))


def test_number_of_rows_separates_prefill_from_decoding() -> None:
    weight = random_weight(8, 1, seed=7)
    mixed = ParoLinear(weight, int8_from=4)
    x = torch.randn(4, 128, generator=generator(8))
    assert torch.equal(mixed(x), ParoLinear(weight, ALWAYS)(x))
    assert torch.equal(mixed(x[:3]), ParoLinear(weight, NEVER)(x[:3]))
    assert (ParoLinear(weight, ALWAYS).format, ParoLinear(weight, NEVER).format) == ("w4a8", "w4a16")


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([16, 128]), st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_without_rotation_it_is_plain_rounding_of_groups(eights: int, groups: int, size: int, seed: int) -> None:
    columns = size * groups
    matrix = quantise(torch.randn(8 * eights, columns, generator=generator(seed)), size)
    pairs = random_pairs(columns, 8, size, generator(seed + 1))
    plain = ParoWeight(pairs, torch.zeros(8, columns // 2).half(), torch.ones(columns).half(), matrix)
    assert torch.equal(ParoLinear(plain).dequantised(), dequantise(matrix))


def test_scales_that_overflowed_count_as_the_largest() -> None:
    weight = random_weight(8, 1, seed=11)
    weight.channel_scales[3], weight.channel_scales[4] = torch.inf, -torch.inf
    layer = ParoLinear(weight)
    assert layer.channel_scales[3] == MAX_CHANNEL_SCALE
    assert layer.channel_scales[4] == -MAX_CHANNEL_SCALE
    assert bool(torch.isfinite(layer(torch.full((2, 128), 6e4))).all())


def test_large_activations_do_not_overflow() -> None:
    layer = ParoLinear(random_weight(8, 1, seed=12), NEVER)
    x = torch.full((1, 128), 3e38).bfloat16()
    assert not bool(layer(x * 1e-4).isinf().any())


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("channel_scales", lambda t: t[:-2], r"channel scales of shape \[256\]"),
        ("channel_scales", lambda t: t * torch.nan, "channel scales without nan"),
        ("angles", lambda t: t[:, :-1], r"angles of shape \[8, 128\]"),
        ("angles", lambda t: t + torch.inf, "finite angles"),
        ("pairs", lambda t: t[:, :-2], r"pairs of shape \[8, 256\]"),
    ],
)
def test_tensors_that_do_not_belong_together(field: str, change: object, message: str) -> None:
    weight = random_weight(8, 2, seed=13)
    assert callable(change)
    with pytest.raises(InputError, match=message):
        ParoLinear(weight._replace(**{field: change(getattr(weight, field))}))
