"""Which precision "auto" stands for: the least rounding that fits the card, and why."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from flashdrive_node.model.checkpoint_files import survey
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.footprint import PRECISIONS, cache_bytes_per_token, cache_tokens, weight_bytes
from flashdrive_node.model.precision import PRESETS, StagePrecision
from flashdrive_node.model.quantised_files import find_quantised
from flashdrive_node.model.source import read_config
from flashdrive_node.model.state_dict import release_slots

#: Of the card's memory: the CUDA context, activations and captured graphs take the rest.
_USABLE = 0.85
#: Prompt that memory is reckoned with: four cameras, four frames each.
_PROMPT_TOKENS = 3100


class Choice(NamedTuple):
    """What "auto" stands for."""

    #: None leaves the stages to the checkpoint.
    stages: StagePrecision | None
    reason: str


def automatic(directory: Path, device: torch.device, samples: int, allow_download: bool = False) -> Choice:
    """The choice for a checkpoint on a device.

    Raises:
        ConfigError, CheckpointError: The checkpoint's configuration cannot be read.
    """
    if device.type != "cuda":
        return Choice(None, f"as the checkpoint says, on {device.type}")
    config = read_config(directory, allow_download)
    if find_quantised(survey(directory), release_slots(config)).matrices:
        return Choice(None, "as the checkpoint says, which holds layers in 4 bits")
    return choose(config, torch.cuda.get_device_properties(device).total_memory, samples)


def choose(config: AlpamayoConfig, memory_bytes: int, samples: int) -> Choice:
    """The choice for a plain checkpoint on a card of so much memory.

    8-bit formats come second even where they fit with ease: what they cost in accuracy is for the user to accept.
    """
    tokens = cache_tokens(config, _PROMPT_TOKENS, samples)
    cache = tokens * cache_bytes_per_token(config)
    slots, gib = release_slots(config), 2**30
    needs = {p.stages: weight_bytes(slots, p) + cache for p in PRECISIONS if p.plain_bytes == 2}
    usable = _USABLE * memory_bytes
    said = f"of {memory_bytes / gib:.1f} GiB, {usable / gib:.1f} are reckoned with; bf16 takes"
    bf16, fp8 = needs[PRESETS["bf16"]], needs[PRESETS["fp8"]]
    if bf16 <= usable:
        return Choice(PRESETS["bf16"], f"bf16: {said} {bf16 / gib:.1f}")
    if fp8 <= usable:
        return Choice(PRESETS["fp8"], f"fp8: {said} {bf16 / gib:.1f}, fp8 {fp8 / gib:.1f}")
    w4 = needs[PRESETS["w4a8"]]
    return Choice(
        PRESETS["fp8"],
        f"fp8: {said} {bf16 / gib:.1f}, fp8 {fp8 / gib:.1f}, too much as well; 'flashdrive quantize' makes a "
        f"checkpoint that takes {w4 / gib:.1f}",
    )
