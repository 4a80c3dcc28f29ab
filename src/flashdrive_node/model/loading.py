"""From a checkpoint's name to a model that is ready to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flashdrive_node.model.alpamayo import Alpamayo, Constants
from flashdrive_node.model.checkpoint import CheckpointInfo, load_weights
from flashdrive_node.model.checkpoint_files import CheckpointFiles, check_tensors, survey
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.paro_layouts import GENERIC
from flashdrive_node.model.precision import INPUTS_KEY, PRECISION_KEY, W4A8, StagePrecision
from flashdrive_node.model.quantised_files import CONFIG_KEY, QuantisedFiles, find_quantised
from flashdrive_node.model.quantised_loading import LayerPlacer
from flashdrive_node.model.source import read_config, resolve_source, tokenizer_directory
from flashdrive_node.model.state_dict import release_slots
from flashdrive_node.model.tokenizer import AlpamayoTokenizer, load_tokenizer
from flashdrive_node.model.unpacked_cache import unpacked_file

logger = logging.getLogger(__name__)

#: Precisions that a checkpoint can be loaded in, by the name used in parameters and on the command line.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory."""

    model: Alpamayo
    tokenizer: AlpamayoTokenizer
    info: CheckpointInfo
    precision: StagePrecision = field(default_factory=StagePrecision)


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
    precision: StagePrecision | None = None,
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
        precision: Formats of the stages; None takes what the checkpoint's configuration says, else W4A8 for layers
            that it holds in 4 bits and `dtype` for the rest.
        progress: Called with a fraction in 0..1 and what is being done.

    Raises:
        ConfigError, CheckpointError: The files cannot be used; lists everything that is wrong with them.
    """
    directory = resolve_source(name_or_path, revision, allow_download)
    config = read_config(directory, allow_download)
    tokenizer = load_tokenizer(tokenizer_directory(directory, config, allow_download), config)
    model = Alpamayo.on_meta(config, dtype)
    model.set_constants(constants, device)
    files = survey(directory)
    quantised = find_quantised(files, release_slots(config), config.raw.get(CONFIG_KEY))
    precision = _stages(precision, config.raw.get(PRECISION_KEY), quantised, directory)
    unpacked = _unpacked(files, quantised, device)
    if unpacked is not None:
        quantised = quantised.unpacked()
    try:
        largest_inputs = config.raw.get(INPUTS_KEY)
        conversions = precision.conversions(model, frozenset(quantised.matrices), largest_inputs)
        placer = LayerPlacer(model, quantised.matrices, precision.int8_from, conversions, device)
    except InputError as error:
        raise CheckpointError(str(directory), [str(error)]) from error
    info = load_weights(
        model,
        quantised.slots,
        directory,
        device,
        overlay=overlay,
        progress=progress,
        hash_files=hash_files,
        completed=placer.completed,
        take=placer.take,
        ignored=quantised.ignored,
        unpacked=unpacked,
    )
    logger.info(
        "loaded %s (%s) revision %s sha256 %s: %d tensors, %.2f GiB in %.1f s",
        config.model_type, directory, info.revision or "none", info.sha256 or "not computed",
        info.tensors, info.bytes / 2**30, info.seconds,
    )  # fmt: skip
    return LoadedModel(model, tokenizer, info, precision)


def _unpacked(files: CheckpointFiles, quantised: QuantisedFiles, device: torch.device | str) -> Path | None:
    """The file with matrices of a foreign layout that were unpacked before, or now; None where there is no need."""
    foreign = quantised.layout not in (None, GENERIC)
    whole = not files.problems and not check_tensors(files, quantised.slots, quantised.ignored)
    return unpacked_file(files, quantised) if foreign and whole and torch.device(device).type == "cpu" else None


def _stages(asked: StagePrecision | None, entry: Any, quantised: QuantisedFiles, directory: Path) -> StagePrecision:
    """The formats of the stages, which must fit what the checkpoint holds."""
    problems = list(quantised.problems)
    stored = any(name.startswith("language.layers.") for name in quantised.matrices)
    if other := sorted(name for name in quantised.matrices if not name.startswith("language.layers.")):
        problems.append(f"4 bits are taken for layers of the language model alone, found {', '.join(other[:4])}")
    stages = asked or (StagePrecision.parse(entry) if entry is not None else StagePrecision())
    if asked is None and entry is None and stored:
        stages = replace(stages, prefill=W4A8, decode=W4A8)
    if stages.four_bits and not stored:
        problems.append(
            f"precision {stages.decode} needs a checkpoint of 4-bit layers, found none; 'flashdrive quantize' makes one"
        )
    if stored and not stages.four_bits:
        problems.append(f"the text layers are stored in 4 bits: w4a8 or w4a16 is required, found {stages.decode}")
    if problems:
        raise CheckpointError(str(directory), problems)
    return stages
