"""The release with narrow, few layers and random weights: its vocabulary and prompt in full, at a test's cost."""

from __future__ import annotations

import copy
import shutil
import tempfile
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from flashdrive_node.model.checkpoint_writer import random_checkpoint
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.config_parser import parse_config
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.presets import alpamayo_1_5_10b
from flashdrive_node.model.tokenizer import prompt_subset_tokenizer
from support.small_models import random_model


def small_alpamayo(base: AlpamayoConfig | None = None) -> AlpamayoConfig:
    """A release with narrow, few layers and everything else (vocabulary, prompt, image size) as published.

    Args:
        base: The release; Alpamayo 1.5 by default.
    """
    base = base or alpamayo_1_5_10b()
    model, vlm = copy.deepcopy(base.raw), copy.deepcopy(base.raw_vlm)
    text: dict[str, Any] = vlm["text_config"]
    text |= {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 32, "intermediate_size": 192}
    text["rope_scaling"] = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [8, 4, 4]}
    vlm["vision_config"] |= {
        "hidden_size": 64,
        "depth": 4,
        "num_heads": 4,
        "intermediate_size": 128,
        "deepstack_visual_indexes": [1, 2, 3],
        "out_hidden_size": 64,
    }
    model["expert_cfg"] |= {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "intermediate_size": 128}
    return parse_config(model, vlm, f"small {base.model_type}")


def write_random_checkpoint(directory: Path, seed: int = 0, base: AlpamayoConfig | None = None) -> Path:
    """Write the small checkpoint, with the part of the Qwen vocabulary that prompts need; about 40 MB.

    Args:
        directory: Must not exist.
        seed: Draws the weights.
        base: See `small_alpamayo`.

    Raises:
        ModelError: The directory is in use.
        OSError: Writing failed.
    """
    vocabulary = files("flashdrive_node.model") / "data" / "qwen_prompt_vocab.json"
    with tempfile.TemporaryDirectory() as folder, as_file(vocabulary) as source:
        shutil.copyfile(source, Path(folder) / "tokenizer.json")
        return random_checkpoint(small_alpamayo(base), directory, seed, tokenizer_files_dir=Path(folder))


def damped_model() -> LoadedModel:
    """The small release with random weights, for pictures of 64 x 96, whose paths rounding does not throw off."""
    config = replace(small_alpamayo(), min_pixels=32 * 32, max_pixels=64 * 96)
    model = random_model(config, seed=3)
    # Undamped, random weights behind the Fourier features amplify rounding from flow step to flow step.
    projection = model.expert.action_in_proj
    projection.linears[0].weight /= projection.frequencies[0].repeat(6)
    return LoadedModel(model, prompt_subset_tokenizer(config), None)
