"""What a model needs in memory, by arithmetic on its architecture: nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.state_dict import TensorSlot

#: Parts of the model in the order of the forward pass, by the prefix of their tensors; the first that fits counts.
PARTS = {
    "vision tower": "vlm.model.visual.",
    "token embedding": "vlm.model.language_model.embed_tokens.",
    "text layers": "vlm.model.language_model.",
    "lm_head": "vlm.lm_head.",
    "action expert": "expert.",
    "projections": "action_",
}

#: Parts whose matrices a weight-only quantisation stores in fewer bits; everything else stays in bfloat16.
QUANTISED_PARTS = ("text layers", "lm_head", "action expert")

#: Input channels that share one scale in 4-bit weights.
GROUP_SIZE = 128


@dataclass(frozen=True)
class Precision:
    """A way to store the weights."""

    name: str
    #: Bits of a weight in the quantised matrices, and of everything else.
    matrix_bits: int
    other_bits: int
    #: Input channels per scale (0: no scales, None: one scale per output row) and bits of a scale.
    group_size: int | None = 0
    scale_bits: int = 0
    #: Bits of a value in the key/value cache.
    cache_bits: int = 16


PRECISIONS = (
    Precision("float32", 32, 32, cache_bits=32),
    Precision("bfloat16", 16, 16),
    Precision("8-bit weights", 8, 16, None, 32),
    Precision(f"4-bit weights, groups of {GROUP_SIZE}", 4, 16, GROUP_SIZE, 16),
)


def part_of(name: str) -> str:
    """Part of the model that a tensor of the release belongs to; "other" for names that are none of it."""
    return next((part for part, prefix in PARTS.items() if name.startswith(prefix)), "other")


def weight_bytes(slots: Iterable[TensorSlot], precision: Precision) -> int:
    """Bytes of all weights; the small constants of R1 files do not count."""
    bits = 0
    for slot in slots:
        if slot.optional:
            continue
        size = math.prod(slot.shape)
        if len(slot.shape) < 2 or part_of(slot.name) not in QUANTISED_PARTS:
            bits += size * precision.other_bits
            continue
        rows, columns = slot.shape
        group = precision.group_size
        scales = 0 if group == 0 else rows if group is None else rows * math.ceil(columns / group)
        bits += size * precision.matrix_bits + scales * precision.scale_bits
    return math.ceil(bits / 8)


def cache_bytes_per_token(config: AlpamayoConfig, item_bytes: int = 2) -> int:
    """Keys and values of one token in every layer, 2 bytes each in bfloat16."""
    return 2 * config.text.num_layers * config.text.kv_size * item_bytes


def cache_tokens(config: AlpamayoConfig, prompt_tokens: int, samples: int) -> int:
    """Cache slots for one window: the prompt once, and for each sample its generated text and its waypoints.

    The text counts with the release's default limit, ``tokens_per_future_traj``.
    """
    return prompt_tokens + samples * (config.tokens_per_future_traj + config.action_space.n_waypoints)
