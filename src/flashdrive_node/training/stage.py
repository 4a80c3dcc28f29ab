"""A stage of training from start to end: model, ranks, training, files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed

from flashdrive_node.evaluation.history_baseline import FILE_NAME, HistoryBaseline, load_history_baseline
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import CheckpointError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.model.tokenizer import AlpamayoTokenizer, load_tokenizer
from flashdrive_node.training.architecture import alpamayo_small
from flashdrive_node.training.initial_weights import new_model
from flashdrive_node.training.losses import AuxiliaryHeads
from flashdrive_node.training.vla import CHECKPOINT, HEADS_FILE, Rank, TrainingSettings, VlaTrainer
from flashdrive_node.training.vocabulary import build_tokenizer


def run_stage(
    out: Path,
    settings: TrainingSettings,
    device: str = "auto",
    resume: Path | None = None,
    dims: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Train one stage and write its files.

    Args:
        out: New or empty directory.
        settings: Of the stage.
        device: "auto" takes a GPU where there is one; under torchrun the one of this rank.
        resume: Directory of an earlier stage; without it training begins from nothing.
        dims: Dimensions to change in a new model, see `alpamayo_small`.

    Returns:
        Figures of the result; None in all ranks but the first.

    Raises:
        ModelError: The earlier stage cannot be loaded, or `out` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(str(out), ["a new or empty directory is required, found one in use"])
    rank, chosen = _join_ranks(device)
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # The processor's cores belong to the processes that compute drives.
        torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder)
            config = alpamayo_small(build_tokenizer(files), **(dims or {}))
            tokenizer = load_tokenizer(files, config)
            model = _model(resume, config, tokenizer, chosen, dtype, settings.seed)
            heads = _heads(resume, model)
            trainer = VlaTrainer(model, heads, tokenizer, settings, rank, _baseline(resume))
            log = trainer.run()
            if not rank.first:
                return None
            trainer.save(out, files)
            return log.result
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _join_ranks(device: str) -> tuple[Rank, torch.device]:
    """This process among those that torchrun started, if it did."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Rank(), chosen
    index = int(os.environ["RANK"])
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
        distributed.init_process_group("nccl", device_id=chosen)
    else:
        distributed.init_process_group("gloo")
    return Rank(index, count), chosen


def _model(
    resume: Path | None,
    config: AlpamayoConfig,
    tokenizer: AlpamayoTokenizer,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Alpamayo:
    if resume is None:
        return new_model(config, device, dtype, seed)
    loaded = load_alpamayo(resume / CHECKPOINT, device, dtype)
    if loaded.tokenizer.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise CheckpointError(str(resume), ["the vocabulary of this version is required, found another one"])
    return loaded.model.requires_grad_(True)


def _heads(resume: Path | None, model: Alpamayo) -> AuxiliaryHeads:
    heads = AuxiliaryHeads(model.config)
    if resume is not None and (resume / HEADS_FILE).is_file():
        heads.load_state_dict(load_file(resume / HEADS_FILE))
    return heads.to(model.device, model.dtype)


def _baseline(resume: Path | None) -> HistoryBaseline | None:
    if resume is None or not (resume / FILE_NAME).is_file():
        return None
    return load_history_baseline(resume / FILE_NAME).requires_grad_(True).train()
