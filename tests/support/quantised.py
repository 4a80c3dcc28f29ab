"""Layers and small checkpoints of 4 bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.givens import random_pairs
from flashdrive_node.model.int4 import Int4Weight, quantise
from flashdrive_node.model.paro_layouts import read_generic
from flashdrive_node.model.paroquant import ParoWeight
from flashdrive_node.model.precision import PRESETS
from flashdrive_node.model.quantised_writer import save_quantised
from flashdrive_node.training.architecture import alpamayo_small
from flashdrive_node.training.vocabulary import build_tokenizer
from support.small_models import random_model
from support.tiny_dimensions import TINY

#: o_proj has 64 columns, which make no group.
NARROW: dict[str, Any] = TINY | {"text_hidden": 128, "text_mlp": 128, "text_heads": 4, "kv_heads": 2}


def random_weight(rows: int, groups: int, seed: int, size: int = 128) -> ParoWeight:
    """A layer of random integers, angles and scales."""
    g = torch.Generator().manual_seed(seed)
    columns = size * groups
    matrix = Int4Weight(
        torch.randint(256, (rows, columns // 2), generator=g, dtype=torch.uint8),
        (torch.rand(rows, groups, generator=g) * 0.02 + 0.001).half(),
        torch.randint(16, (rows, groups), generator=g, dtype=torch.uint8),
    )
    angles = (torch.rand(8, columns // 2, generator=g) * 6 - 3).half()
    scales = (torch.rand(columns, generator=g) + 0.5).half()
    return ParoWeight(random_pairs(columns, 8, size, g), angles, scales, matrix)


def four_bit(model: Alpamayo) -> dict[str, ParoWeight]:
    """Every text layer whose columns make groups of 128, rounded to the nearest behind a rotation by nothing."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, module in model.named_modules():
        if not (name.startswith("language.layers.") and isinstance(module, nn.Linear)) or module.in_features % 128:
            continue
        columns = module.in_features
        layers[name] = ParoWeight(
            random_pairs(columns, 8, 128, generator),
            torch.zeros(8, columns // 2).half(),
            torch.ones(columns).half(),
            quantise(module.weight, 128),
        )
    return layers


def plain_model(tokenizer_files: Path, dims: dict[str, Any]) -> Alpamayo:
    """Random weights; the tokenizer's files are written."""
    return random_model(alpamayo_small(build_tokenizer(tokenizer_files), **dims), seed=3)


def quantised_checkpoint(model: Alpamayo, tokenizer_files: Path, directory: Path) -> Path:
    """`four_bit` of a model, written in the generic layout for preset w4a8."""
    return save_quantised(model, four_bit(model), PRESETS["w4a8"], model.config, directory, tokenizer_files)


def republished(
    checkpoint: Path, out: Path, tensors_of: Callable[[ParoWeight], dict[str, torch.Tensor]], only: str = ""
) -> Path:
    """A copy whose 4-bit matrices (those with `only` in their names) are in another layout."""
    held = load_file(checkpoint / "model.safetensors")
    stems = [name.removesuffix(".qweight") for name in held if name.endswith(".qweight") and only in name]
    for stem in stems:
        leaves = ("theta", "pairs", "channel_scales", "qweight", "qzeros", "scales")
        weight = read_generic({leaf: held.pop(f"{stem}.{leaf}") for leaf in leaves})
        held |= {f"{stem}.{name}": tensor.contiguous() for name, tensor in tensors_of(weight).items()}
    patch = "vlm.model.visual.patch_embed.proj.weight"
    held[patch] = held[patch].flatten(1)  # as the published files have it
    out.mkdir()
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"], config["stage_precision"]  # the published files say nothing of it
    config["vlm_name_or_path"] = str(checkpoint / "vlm")
    (out / "config.json").write_text(json.dumps(config))
    return out
