"""From a checkpoint's name to a model that is ready to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flashdrive_node.model.alpamayo import Alpamayo, Constants
from flashdrive_node.model.checkpoint import CheckpointInfo, load_weights
from flashdrive_node.model.source import read_config, resolve_source, tokenizer_directory
from flashdrive_node.model.state_dict import release_slots
from flashdrive_node.model.tokenizer import AlpamayoTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

#: Precisions that a checkpoint can be loaded in, by the name used in parameters and on the command line.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory."""

    model: Alpamayo
    tokenizer: AlpamayoTokenizer
    info: CheckpointInfo


def load_alpamayo(
    name_or_path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    revision: str | None = None,
    allow_download: bool = False,
    overlay: Path | None = None,
    constants: Constants = "release",
    hash_files: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> LoadedModel:
    """Load a checkpoint: configuration, tokenizer, weights.

    Args:
        name_or_path: Local directory or Hugging Face id.
        device: Where the weights go.
        dtype: Type of the large weights; the small action projections stay float32.
        revision: Revision of a Hugging Face id.
        allow_download: Fetch what the local cache lacks; the network is not touched otherwise.
        overlay: Fine-tuned expert to put over the checkpoint's.
        constants: See `Constants`.
        hash_files: Compute the SHA-256 of the files.
        progress: Called with a fraction in 0..1 and what is being done.

    Raises:
        ConfigError, CheckpointError: The files cannot be used; lists everything that is wrong with them.
    """
    directory = resolve_source(name_or_path, revision, allow_download)
    config = read_config(directory, allow_download)
    tokenizer = load_tokenizer(tokenizer_directory(directory, config, allow_download), config)
    model = Alpamayo.on_meta(config, dtype)
    model.set_constants(constants, device)
    info = load_weights(
        model, release_slots(config), directory, device, overlay=overlay, progress=progress, hash_files=hash_files
    )
    logger.info(
        "loaded %s (%s) revision %s sha256 %s: %d tensors, %.2f GiB in %.1f s",
        config.model_type, directory, info.revision or "none", info.sha256 or "not computed",
        info.tensors, info.bytes / 2**30, info.seconds,
    )  # fmt: skip
    return LoadedModel(model, tokenizer, info)
