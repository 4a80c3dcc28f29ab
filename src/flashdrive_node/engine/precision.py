"""Which precision "auto" stands for: what is fastest on the card or fits it with the least rounding, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flashdrive_node.engine.precision_speeds import MeasuredSpeed, read_speeds, times_of
from flashdrive_node.model.checkpoint_files import survey
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.footprint import Precision, cache_bytes_per_token, cache_tokens, weight_bytes
from flashdrive_node.model.precision import PRECISION_KEY, PRESETS, StagePrecision
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


class Card(NamedTuple):
    """What of a GPU the choice depends on."""

    memory_bytes: int
    #: Compute capability, such as "9.0".
    capability: str


def automatic(directory: Path, device: torch.device, samples: int, allow_download: bool = False) -> Choice:
    """The choice for a checkpoint on a device.

    Raises:
        ConfigError, CheckpointError: The checkpoint's configuration cannot be read.
    """
    if device.type != "cuda":
        return Choice(None, f"as the checkpoint says, on {device.type}")
    config = read_config(directory, allow_download)
    if PRECISION_KEY in config.raw:
        return Choice(None, "as the checkpoint says, which was calibrated for it")
    packed = bool(find_quantised(survey(directory), release_slots(config)).matrices)
    properties = torch.cuda.get_device_properties(device)
    card = Card(properties.total_memory, f"{properties.major}.{properties.minor}")
    return choose(config, card, samples, read_speeds(), packed)


def choose(
    config: AlpamayoConfig, card: Card, samples: int, speeds: Sequence[MeasuredSpeed], packed: bool = False
) -> Choice:
    """The fastest preset that fits the card, of those that were measured on such cards; else the least rounding.

    Args:
        config: Of the checkpoint.
        card: Where it is to run.
        samples: Trajectories per window.
        speeds: What was measured.
        packed: Whether the checkpoint's text layers have 4 bits.
    """
    needs = _needs(config, samples)
    names = [name for name, stages in PRESETS.items() if stages.four_bits == packed]
    usable, gib = _USABLE * card.memory_bytes, 2**30
    fitting = [name for name in names if needs[name] <= usable]
    measured = times_of(speeds, card.capability, config.text.hidden_size, samples, fitting)
    if measured:
        best = min(measured, key=lambda name: measured[name].window_ms)
        row = measured[best]
        said = ", ".join(f"{name} {m.window_ms:.1f} ms" for name, m in measured.items())
        return Choice(
            PRESETS[best],
            f"{best}: the fastest that fits; measured on {row.device} with {row.samples} sample(s): {said}",
        )
    if packed:
        return Choice(None, "as the checkpoint says, which holds layers in 4 bits")
    taken = ", ".join(f"{name} {needs[name] / gib:.1f}" for name in names)
    said = f"of {card.memory_bytes / gib:.1f} GiB, {usable / gib:.1f} are reckoned with; needed are: {taken}"
    if fitting:
        return Choice(PRESETS[fitting[0]], f"{fitting[0]}: {said}")
    return Choice(
        PRESETS[names[-1]],
        f"{names[-1]}: {said}, too much as well; 'flashdrive quantize' makes a checkpoint that takes "
        f"{needs['w4a8'] / gib:.1f}",
    )


def _needs(config: AlpamayoConfig, samples: int) -> dict[str, int]:
    """Bytes of weights and cache, by preset."""
    tokens = cache_tokens(config, _PROMPT_TOKENS, samples)
    cache, slots = tokens * cache_bytes_per_token(config), release_slots(config)
    return {name: weight_bytes(slots, Precision(name, stages)) + cache for name, stages in PRESETS.items()}
