"""Writing checkpoints in the release's format: a trained model, or one with random weights for tests and benchmarks.

The result always stands on its own: the backbone's configuration, and its tokenizer files where they are given, lie in
``vlm/`` beside the weights, and ``vlm_name_or_path`` points there. Files appear under their final directory at once
and complete, or not at all.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flashdrive_node.model.checkpoint import materialise, place_of
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import CheckpointError
from flashdrive_node.model.expert import fourier_frequencies
from flashdrive_node.model.safetensors_file import DTYPE_NAMES, TensorSpec, write_file
from flashdrive_node.model.source import TOKENIZER_FILES
from flashdrive_node.model.state_dict import TensorSlot, release_slots

logger = logging.getLogger(__name__)

#: The release's shards are of this size.
SHARD_BYTES = 5_000_000_000
_BACKBONE = "vlm"


def save_checkpoint(
    model: nn.Module,
    config: AlpamayoConfig,
    directory: Path,
    max_shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = torch.bfloat16,
    tokenizer_files_dir: Path | None = None,
) -> Path:
    """Write a model under the release's tensor names, one tensor in host memory at a time.

    Args:
        model: Modules that `release_slots` of `config` describes.
        config: Its architecture; the keys of ``config.json`` are written back as they were read.
        directory: New or empty directory.
        max_shard_bytes: Largest tensor data per file; more than one file brings an index.
        dtype: Type of all tensors, bfloat16 as in the release; None keeps the model's own types, so that nothing is
            rounded.
        tokenizer_files_dir: Where tokenizer and processor files are copied from (`tokenizer_directory`).

    Returns:
        `directory`.

    Raises:
        CheckpointError: The directory is in use, or a type cannot be written.
        OSError: Writing failed; nothing is left behind.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    specs = [
        TensorSpec(slot.name, slot.shape, dtype or tensors[slot.target].dtype, partial(released, slot, tensors))
        for slot in release_slots(config)
    ]
    return write_checkpoint(specs, config, directory, max_shard_bytes, dtype, tokenizer_files_dir)


def released(slot: TensorSlot, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor as the files have it, out of the modules' tensors by name."""
    return place_of(slot, tensors[slot.target].detach()).view(slot.shape)


def random_checkpoint(
    config: AlpamayoConfig,
    directory: Path,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer_files_dir: Path | None = None,
) -> Path:
    """Write a checkpoint with random weights (`random_tensor`), one tensor in memory at a time.

    Arguments, result and errors as in `save_checkpoint`; `device` is where the numbers are drawn.
    """
    specs = [
        TensorSpec(slot.name, slot.shape, dtype, partial(random_tensor, slot, config, seed, device, dtype))
        for slot in release_slots(config)
    ]
    return write_checkpoint(specs, config, directory, max_shard_bytes, dtype, tokenizer_files_dir)


def random_weights(
    model: nn.Module,
    config: AlpamayoConfig,
    device: torch.device | str,
    seed: int = 0,
    skip: Container[str] = (),
) -> None:
    """Fill a model, in its own types, with what `random_checkpoint` would write in bfloat16 on the same device.

    Args:
        model: On the meta device, or filled.
        config: Its architecture.
        device: Where the weights go.
        seed: Of the numbers.
        skip: Parameters that the model does not have, because other layers stand in their places.
    """
    device = torch.empty(0, device=device).device
    for slot in release_slots(config):
        if slot.target in skip:
            continue
        place = place_of(slot, materialise(model, slot.target, device))
        if place.dtype == torch.bfloat16:  # drawn in place: the largest is as large as a tenth of a quantised model
            random_tensor(slot, config, seed, device, torch.bfloat16, place.view(slot.shape))
        else:
            place.copy_(random_tensor(slot, config, seed, device, torch.bfloat16).view(-1))


def random_tensor(
    slot: TensorSlot,
    config: AlpamayoConfig,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Weights of standard deviation 0.02, norm scales of 1; the same for one (seed, name, device), whatever the shards.

    R1's stored constants get their configured values. The first layer behind the Fourier features is damped in
    proportion to the frequency, without which a random network amplifies rounding about 30-fold per flow step. They go
    to `out`, contiguous and of this shape and type, where it is given.
    """
    tensor = torch.empty(slot.shape, device=device, dtype=dtype) if out is None else out
    if slot.optional:
        return tensor.copy_(_constant(slot, config).view(slot.shape))
    if slot.name.endswith(".weight") and len(slot.shape) == 1:
        return tensor.fill_(1.0)
    # The CPU's generator takes only the lower 32 bits of a seed, so both go into a hash of that size.
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {slot.name}".encode()))
    tensor.normal_(0.0, 0.02, generator=generator)
    if slot.name == "action_in_proj.encoder.trunk.0.weight":
        frequencies = fourier_frequencies(config.action_in_proj)
        # Columns: sines, then cosines, for each channel and the time.
        tensor /= frequencies.repeat(slot.shape[1] // len(frequencies)).to(device, dtype)
    return tensor


def _constant(slot: TensorSlot, config: AlpamayoConfig) -> Tensor:
    if slot.name.endswith(".freqs"):
        return fourier_frequencies(config.action_in_proj)
    return torch.tensor(getattr(config.action_space, slot.name.rpartition(".")[2]))


def write_checkpoint(
    specs: Sequence[TensorSpec],
    config: AlpamayoConfig,
    directory: Path,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
    tokenizer_files_dir: Path | None,
) -> Path:
    """Write given tensors with a configuration. Arguments, result and errors as in `save_checkpoint`.

    `specs` say the types; `dtype` is what the configuration gives for them, None leaves it as it is.
    """
    problems = [] if max_shard_bytes > 0 else [f"max_shard_bytes must be positive, found {max_shard_bytes}"]
    if bad := sorted({str(spec.dtype) for spec in specs if spec.dtype not in DTYPE_NAMES}):
        problems.append(f"types {', '.join(map(str, DTYPE_NAMES))} can be written, found {', '.join(bad)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        problems.append("a new or empty directory is required, found one in use")
    if problems:
        raise CheckpointError(str(directory), problems)
    partial_dir = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial_dir.mkdir(parents=True)
    try:
        written = _write_shards(specs, partial_dir, max_shard_bytes)
        _write_config(config, partial_dir, dtype, tokenizer_files_dir)
        # A rename onto an empty directory replaces it.
        partial_dir.rename(directory)
    except BaseException:
        shutil.rmtree(partial_dir, ignore_errors=True)
        raise
    logger.info("saved %s: %d tensors, %.3f GB", directory, len(specs), written / 1e9)
    return directory


def _write_shards(specs: Sequence[TensorSpec], directory: Path, max_shard_bytes: int) -> int:
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + spec.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        return write_file(directory / "model.safetensors", shards[0])
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        total += write_file(directory / name, shard)
        weight_map |= {spec.name: name for spec in shard}
    parameters = sum(math.prod(spec.shape) for spec in specs)
    metadata = {"total_parameters": parameters, "total_size": total}
    _write_json(directory / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    return total


def _write_config(
    config: AlpamayoConfig, directory: Path, dtype: torch.dtype | None, tokenizer_files_dir: Path | None
) -> None:
    raw = config.raw | {"vlm_name_or_path": _BACKBONE}
    if dtype is not None:
        raw["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(directory / "config.json", raw)
    backbone = directory / _BACKBONE
    backbone.mkdir()
    _write_json(backbone / "config.json", config.raw_vlm)
    if tokenizer_files_dir is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer_files_dir / name).is_file():
                shutil.copyfile(tokenizer_files_dir / name, backbone / name)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
