"""New drafters and their files, in the layout that `engine.drafter.load_drafter` reads."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdrive_node.engine.drafter import VOCABULARY_FILE, Drafter, drafter_slots
from flashdrive_node.engine.drafter_config import DFLASH, PARTS, ROUTINE, DrafterConfig, Part, Rotary, rotary_sections
from flashdrive_node.engine.mask_embedding import MASK_FILES
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint_writer import released
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.safetensors_file import TensorSpec, write_file

#: Standard deviation of new weights, and rotary base, as in the published drafters.
_DEVIATION, _ROPE_THETA = 0.02, 1e6


def drafter_config(
    target: AlpamayoConfig,
    layers: int = 1,
    intermediate_size: int | None = None,
    block_size: int = 8,
    context_length: int = 4,
    target_layer_ids: tuple[int, ...] | None = None,
    rotary: Rotary = "local",
    parts: tuple[Part, ...] = (),
    image_cells: tuple[int, int] = (2, 3),
) -> DrafterConfig:
    """Architecture of a drafter for a target; heads and width are the target's.

    Args:
        target: What it drafts for.
        layers: Decoder layers.
        intermediate_size: Of the MLPs; the target's by default.
        block_size: Tokens of a block, the known one included.
        context_length: States that a proposal looks at.
        target_layer_ids: Layers whose outputs are these states; by default the middle one and the last two.
        rotary: Positions.
        parts: Of the prompt, that a routine drafter looks at; DFlash has none.
        image_cells: Rows and columns that images are averaged to.

    Raises:
        InputError: Sizes that make no drafter.
    """
    count = target.text.num_layers
    ids = tuple(sorted({count // 2, max(count - 2, 0), count - 1})) if target_layer_ids is None else target_layer_ids
    if min(layers, context_length) < 1 or block_size < 2 or not ids or any(not 0 <= i < count for i in ids):
        raise InputError(
            f"1 layer or more, a context of 1 or more, blocks of 2 or more and target layers 0 to {count - 1} are "
            f"required, found {layers}, {context_length}, {block_size} and {list(ids)}"
        )
    decoder = replace(
        target.text,
        num_layers=layers,
        intermediate_size=intermediate_size or target.text.intermediate_size,
        rope_theta=_ROPE_THETA,
        mrope_section=rotary_sections(rotary, target.text),
    )
    parts = tuple(part for part in PARTS if part in parts)
    mask = target.tokens.vocab_size
    return DrafterConfig(decoder, ids, block_size, context_length, mask, rotary, parts, image_cells)


def new_drafter(config: DrafterConfig, target: Alpamayo, seed: int) -> Drafter:
    """A drafter with random weights on the target's device in its type, every part of it to be trained.

    The mask token begins as the mean of the target's embeddings, which the layers can tell from all tokens.
    """
    with torch.device(target.device):
        drafter = Drafter(config).to(target.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * _DEVIATION)
        mask = target.language.embed_tokens.weight.float().mean(dim=0).to(target.dtype)
    return trainable(drafter, mask)


def trainable(drafter: Drafter, mask: Tensor | None = None) -> Drafter:
    """Make every part of a drafter a parameter, the mask token's embedding (with this value) included."""
    value = drafter.mask_embedding if mask is None else mask
    drafter.mask_embedding = nn.Parameter(value.detach().clone())
    return drafter.requires_grad_(True).train()


def save_drafter(drafter: Drafter, directory: Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write ``config.json``, weights and mask embedding.

    Args:
        drafter: Of any type, on any device.
        directory: New or empty.
        dtype: Of the weights in the files.

    Returns:
        Bytes of tensor data.

    Raises:
        CheckpointError: The directory is in use.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(str(directory), ["a new or empty directory is required, found one in use"])
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = dict(drafter.named_parameters())
    specs = [
        TensorSpec(slot.name, slot.shape, dtype, partial(released, slot, tensors))
        for slot in drafter_slots(drafter.config)
    ]
    written = write_file(directory / "model.safetensors", specs)
    mask = drafter.mask_embedding.detach()
    written += write_file(
        directory / MASK_FILES[0], [TensorSpec("mask_embedding", tuple(mask.shape), dtype, lambda: mask)]
    )
    (directory / "config.json").write_text(
        json.dumps(_content(drafter.config, dtype), indent=2) + "\n", encoding="utf-8"
    )
    return written


def save_draft_vocabulary(ids: Tensor, directory: Path) -> None:
    """Write the tokens that a drafter may guess beside its weights: int64 [n]."""
    save_file({"ids": ids}, directory / VOCABULARY_FILE)


def _content(config: DrafterConfig, dtype: torch.dtype) -> dict[str, object]:
    decoder = config.decoder
    looks: dict[str, object] = {"architectures": [DFLASH]}
    if config.variant == "routine":
        looks = {
            "architectures": [ROUTINE],
            "rotary": config.rotary,
            "prompt_parts": list(config.parts),
            "image_cells": list(config.image_cells),
        }
    return {
        **looks,
        "attention_bias": False,
        "block_size": config.block_size,
        "context_len": config.context_length,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "is_causal": False,
        "mask_token_id": config.mask_token_id,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "target_layer_ids": list(config.target_layer_ids),
    }
