"""Quantised layers with random contents, made in their own formats: no plain weight of their size is ever there."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.givens import random_pairs
from flashdrive_node.model.int4 import Int4Weight
from flashdrive_node.model.linear import ROWS_AT_ONCE, RowwiseLinear
from flashdrive_node.model.paro_layouts import GROUP_SIZE, ROUNDS
from flashdrive_node.model.paroquant import ParoLinear, ParoWeight
from flashdrive_node.model.precision import W4A8, StagePrecision
from flashdrive_node.model.quantised_loading import replace_module

#: Standard deviation of the weights that the layers stand for, as of plain random ones.
_SPREAD = 0.02
#: Of codes 0 to 15, all alike: what a step of 1 gives.
_CODE_SPREAD = (16**2 - 1) ** 0.5 / 12**0.5
#: Largest input of a layer with a static scale, for lack of a calibration.
_LARGEST_INPUT = 8.0


def place_random(model: Alpamayo, stages: StagePrecision, device: torch.device, seed: int = 0) -> frozenset[str]:
    """Put random quantised layers in the places of the linear layers whose stage is quantised.

    Matrices whose columns make no groups of 128 stay plain, as in a 4-bit checkpoint.

    Args:
        model: On the meta device.
        stages: Formats of the stages.
        device: Where the layers go.
        seed: Of their contents.

    Returns:
        Names of the parameters that these layers replace.
    """
    dense = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    four_bits = {
        name: layer
        for name, layer in dense.items()
        if stages.format_of(name) == W4A8 and layer.in_features % GROUP_SIZE == 0
    }
    for name, layer in four_bits.items():
        weight = random_four_bits(layer.out_features, layer.in_features, _generator(device, seed, name))
        replace_module(model, name, ParoLinear(weight, stages.int8_from))
    conversions = stages.conversions(model, frozenset(four_bits), dict.fromkeys(dense, _LARGEST_INPUT))
    for name, convert in conversions.items():
        rowwise = convert(dense[name])
        fill_random(rowwise, dense[name].weight.dtype, _generator(device, seed, name))
        replace_module(model, name, rowwise)
    replaced = [*four_bits, *conversions]
    return frozenset(f"{name}.{leaf}" for name in replaced for leaf, _ in dense[name].named_parameters())


def random_four_bits(rows: int, columns: int, generator: torch.Generator) -> ParoWeight:
    """A 4-bit layer [rows, columns] of random integers and rotations on the generator's device."""
    device, groups = generator.device, columns // GROUP_SIZE
    codes = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8, device=device)
    zeros = torch.randint(6, 10, (rows, groups), generator=generator, dtype=torch.uint8, device=device)
    scales = torch.full((rows, groups), _SPREAD / _CODE_SPREAD, dtype=torch.float16, device=device)
    on_host = torch.Generator().manual_seed(generator.initial_seed())
    pairs = random_pairs(columns, ROUNDS, GROUP_SIZE, on_host).to(device)
    angles = torch.randn(ROUNDS, columns // 2, generator=generator, device=device).half()
    ones = torch.ones(columns, dtype=torch.float16, device=device)
    return ParoWeight(pairs, angles, ones, Int4Weight(codes, scales, zeros))


def fill_random(layer: RowwiseLinear, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Fill a layer that was made on the meta device, on the generator's device; its bias, if any, is 0 in `dtype`."""
    device = generator.device
    layer.make_room(device)
    if layer.bias is not None:
        layer.bias = torch.zeros(layer.out_features, dtype=dtype, device=device)
    for first in range(0, layer.out_features, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, layer.out_features - first)
        drawn = torch.empty(rows, layer.in_features, dtype=dtype, device=device)
        layer.fill(first, drawn.normal_(0.0, _SPREAD, generator=generator))


def _generator(device: torch.device, seed: int, name: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
