"""Writing checkpoints that were calibrated: text layers in 4 bits in ParoQuant's generic layout, and static scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flashdrive_node.model.checkpoint_writer import SHARD_BYTES, released, write_checkpoint
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.int4 import Int4Weight
from flashdrive_node.model.paro_layouts import GENERIC, write_generic
from flashdrive_node.model.paroquant import ParoWeight
from flashdrive_node.model.precision import INPUTS_KEY, PRECISION_KEY, StagePrecision
from flashdrive_node.model.quantised_files import CONFIG_ENTRY, CONFIG_KEY, StoredMatrix
from flashdrive_node.model.safetensors_file import DTYPES, TensorSpec
from flashdrive_node.model.state_dict import TensorSlot, release_slots


def save_quantised(
    model: nn.Module,
    layers: Mapping[str, ParoWeight],
    stages: StagePrecision,
    config: AlpamayoConfig,
    directory: Path,
    tokenizer_files_dir: Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    largest_inputs: Mapping[str, float] | None = None,
    rounded: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model, some of its linear layers in 4 bits and everything else in bfloat16.

    Matrices that are fused in our layer are written one by one, each with the rotation that they share: readers of the
    layout that know nothing of that get the same products.

    Args:
        model: Plain modules that `release_slots` of `config` describes.
        layers: By the name of the linear layer in the model.
        stages: What the checkpoint is meant for, written into its configuration.
        config: Its architecture.
        directory: New or empty directory.
        tokenizer_files_dir: Where tokenizer files are copied from.
        max_shard_bytes: Largest tensor data per file.
        largest_inputs: By linear layer, for static scales; written into the configuration.
        rounded: Weights [N, K] of other linear layers, to be written in the place of the model's.

    Raises:
        CheckpointError: The directory is in use.
        OSError: Writing failed; nothing is left behind.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors |= {f"{name}.weight": weight for name, weight in (rounded or {}).items()}
    specs: list[TensorSpec] = []
    for slot in release_slots(config):
        layer = layers.get(slot.target.removesuffix(".weight"))
        if layer is None:
            specs.append(TensorSpec(slot.name, slot.shape, torch.bfloat16, partial(released, slot, tensors)))
            continue
        for name, stored in StoredMatrix(slot, GENERIC).slots().items():
            dtype = DTYPES[stored.types[0]]
            specs.append(TensorSpec(stored.name, stored.shape, dtype, partial(_stored_tensor, layer, slot, name)))
    raw = config.raw | {PRECISION_KEY: stages.as_dict()}
    raw |= {CONFIG_KEY: dict(CONFIG_ENTRY)} if layers else {}
    raw |= {INPUTS_KEY: dict(largest_inputs)} if largest_inputs else {}
    return write_checkpoint(
        specs, replace(config, raw=raw), directory, max_shard_bytes, torch.bfloat16, tokenizer_files_dir
    )


def _stored_tensor(layer: ParoWeight, slot: TensorSlot, name: str) -> Tensor:
    """One tensor of the rows of a layer that a matrix of the release is."""
    rows = slice(slot.row, slot.row + slot.shape[0])
    matrix = Int4Weight(*(tensor[rows] for tensor in layer.matrix))
    return write_generic(layer._replace(matrix=matrix))[name]
