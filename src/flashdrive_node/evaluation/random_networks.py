"""Networks with random weights at given dimensions: what a latency needs, and no driving skill."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import cast

import torch
from torch import nn

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.drafter_config import PARTS, DrafterConfig
from flashdrive_node.evaluation.random_quantised import place_random
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint import CheckpointInfo
from flashdrive_node.model.checkpoint_writer import random_checkpoint, random_weights
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.precision import StagePrecision
from flashdrive_node.model.quantised_loading import replace_module
from flashdrive_node.model.tokenizer import prompt_subset_tokenizer

#: Of the published drafters (z-lab/Alpamayo-*-DFlash, 469,787,136 parameters): layers, tokens per block, context
#: states, and the layers of the target that they are taken from, as places in a stack of 36.
DRAFTER_LAYERS, DRAFTER_BLOCK, DRAFTER_CONTEXT = 2, 8, 1
DRAFTER_TARGETS, DRAFTER_TARGET_DEPTH = (24, 30, 31, 32, 34), 36


def random_model(
    config: AlpamayoConfig, device: torch.device, dtype: torch.dtype, stages: StagePrecision | None = None
) -> LoadedModel:
    """A model with weights drawn on the device, and a tokenizer that knows the prompt's texts.

    Args:
        config: The architecture.
        device: Where the weights are drawn and stay.
        dtype: Of what is not quantised.
        stages: Formats of the stages, by default none quantised; such layers are drawn in their formats.
    """
    stages = stages or StagePrecision()
    model = Alpamayo.on_meta(config, dtype)
    model.set_constants("release", device)
    random_weights(model, config, device, skip=place_random(model, stages, device))
    info = CheckpointInfo(Path("random weights"), "", "", 0, 0, 0.0)
    return LoadedModel(model, prompt_subset_tokenizer(config), info, stages)


def write_random_checkpoint(config: AlpamayoConfig, directory: Path, device: torch.device) -> None:
    """A random checkpoint with everything that loading needs.

    Raises:
        CheckpointError: The directory is in use.
        OSError: Writing failed.
    """
    random_checkpoint(config, directory, device=device)
    vocabulary = files("flashdrive_node.model") / "data" / "qwen_prompt_vocab.json"
    (directory / "tokenizer.json").write_bytes(vocabulary.read_bytes())


def release_drafter_config(target: AlpamayoConfig, routine: bool = False) -> DrafterConfig:
    """The published drafter's architecture, at the width of any target; or a routine drafter of the same size."""
    text = target.text
    decoder = replace(text, num_layers=DRAFTER_LAYERS, rope_theta=1_000_000.0, mrope_section=(text.head_dim // 2, 0, 0))
    layers = [i * text.num_layers // DRAFTER_TARGET_DEPTH for i in DRAFTER_TARGETS]
    mask = target.tokens.vocab_size  # one row behind the target's table
    config = DrafterConfig(decoder, tuple(layers), DRAFTER_BLOCK, DRAFTER_CONTEXT, mask)
    return replace(config, rotary="flat", parts=PARTS) if routine else config


def random_drafter(
    target: Alpamayo, seed: int = 0, stages: StagePrecision | None = None, routine: bool = False
) -> Drafter:
    """A drafter of `release_drafter_config` on the target's device and in its type, or the format of its stage.

    What it guesses is as good as never right, and takes as long as what a trained one guesses.
    """
    drafter = Drafter(release_drafter_config(target.config, routine)).to(target.device, target.dtype)
    generator = torch.Generator(target.device).manual_seed(seed)
    for name, tensor in (*drafter.named_parameters(), ("mask_embedding", drafter.mask_embedding)):
        if tensor.ndim == 1 and name != "mask_embedding":
            tensor.data.fill_(1.0)  # the scales of norms
        else:
            tensor.data.normal_(0.0, 0.02, generator=generator)
    for name, convert in (stages or StagePrecision()).drafter_conversions(drafter).items():
        replace_module(drafter, name, convert(cast(nn.Linear, drafter.get_submodule(name))))
    return drafter.requires_grad_(False).eval()
