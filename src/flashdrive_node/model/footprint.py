"""What a model needs in memory, by arithmetic on its architecture: nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.paro_layouts import GROUP_SIZE, ROUNDS
from flashdrive_node.model.precision import BF16, INT4, PRESETS, W4A8, StagePrecision
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

#: Bytes that a rotation takes per input channel: channel numbers (int32) and half an angle in each round, and a scale;
#: for kernels, a byte more in each round and behind the last, half a cosine and sine, and a row of two matrices.
_ROTATION_BYTES = ROUNDS * (4 + 1) + 2 + (ROUNDS + 1) + ROUNDS * 4 + 2 * 2 * GROUP_SIZE
#: Bytes of a group's scale and zero point.
_GROUP_BYTES = 2 + 1
#: Bytes of a row's scale in 8-bit formats.
_ROW_BYTES = 4


@dataclass(frozen=True)
class Precision:
    """A way to store the weights."""

    name: str
    stages: StagePrecision
    #: Bytes of a value in what is not quantised, and in the key/value cache.
    plain_bytes: int = 2


PRECISIONS = (
    Precision("float32", PRESETS["bf16"], 4),
    Precision("bfloat16", PRESETS["bf16"]),
    Precision("fp8", PRESETS["fp8"]),
    Precision("w4a8, w4a16", PRESETS["w4a8"]),
)


def part_of(name: str) -> str:
    """Part of the model that a tensor of the release belongs to; "other" for names that are none of it."""
    return next((part for part, prefix in PARTS.items() if name.startswith(prefix)), "other")


def weight_bytes(slots: Iterable[TensorSlot], precision: Precision) -> int:
    """Bytes of all weights; the small constants of R1 files do not count."""
    return sum(_bytes(slot, precision) for slot in slots if not slot.optional)


def _bytes(slot: TensorSlot, precision: Precision) -> int:
    size = math.prod(slot.shape)
    kind = precision.stages.format_of(slot.target.removesuffix(".weight"))
    if len(slot.shape) != 2 or kind == BF16:
        return size * precision.plain_bytes
    rows, columns = slot.shape
    if kind == INT4:
        return size // 2 + rows * columns // GROUP_SIZE * _GROUP_BYTES
    if kind != W4A8:
        return size + rows * _ROW_BYTES
    if columns % GROUP_SIZE or rows % 8:
        return size * precision.plain_bytes
    # Matrices of one layer share the rotation of their input.
    rotation = columns * _ROTATION_BYTES if slot.row == 0 else 0
    return size // 2 + rows * columns // GROUP_SIZE * _GROUP_BYTES + rotation


def cache_bytes_per_token(config: AlpamayoConfig, item_bytes: int = 2) -> int:
    """Keys and values of one token in every layer, 2 bytes each in bfloat16."""
    return 2 * config.text.num_layers * config.text.kv_size * item_bytes


def cache_tokens(config: AlpamayoConfig, prompt_tokens: int, samples: int) -> int:
    """Cache slots for one window: the prompt once, and for each sample its generated text and its waypoints.

    The text counts with the release's default limit, ``tokens_per_future_traj``.
    """
    return prompt_tokens + samples * (config.tokens_per_future_traj + config.action_space.n_waypoints)
