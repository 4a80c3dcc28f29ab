"""Which places of a prompt a routine drafter looks at, and where they stand.

Slots are the cells of the images (averages over parts of them), then the last tokens of the prompt, aligned at its end:
as many as a prompt with the longest navigation text has behind its images. A slot that holds nothing of what is looked
at is hidden, so shapes are the same in all windows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.engine.drafter_config import PARTS, DrafterConfig, Rotary
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.prompt import MAX_NAV_TOKENS, ImageSpan, Prompt, request_ids
from flashdrive_node.model.tokenizer import AlpamayoTokenizer

#: Of a slot that nobody sees.
HIDDEN = -1


class PromptView(NamedTuple):
    """What a drafter is shown of P prompts, with S = cells + room slots each."""

    #: Tapped states of the last tokens, [P, room, context_size].
    states: Tensor
    #: Averaged embeddings of the images, [P, cells, hidden].
    cells: Tensor
    #: Index into `PARTS` or `HIDDEN`, int64 [P, S].
    kinds: Tensor
    #: On three axes, float32 [P, 3, S].
    positions: Tensor
    #: Position of the first generated token, int64 [P].
    base: Tensor


class Slots(NamedTuple):
    """The part of a `PromptView` that follows from a prompt's layout, for one prompt on the host."""

    kinds: Tensor
    positions: Tensor
    base: int


def prompt_room(tokenizer: AlpamayoTokenizer, target: AlpamayoConfig) -> int:
    """Last tokens of a prompt among which its history, navigation text and instruction always are."""
    # The token that closes the history stands between it and the request.
    room = target.tokens_per_history_traj + 1 + len(request_ids(tokenizer))
    return room + (MAX_NAV_TOKENS + 2 if target.supports_navigation else 0)


def tapped_tokens(config: DrafterConfig, room: int) -> int:
    """Last tokens of a prompt whose states a drafter needs; `room` is that of `prompt_room`."""
    return max(room, config.context_length) if config.variant == "routine" else config.context_length


# Of a prompt's layout; a node meets the same few again and again.
@lru_cache(maxsize=64)
def place_slots(prompt: Prompt, config: DrafterConfig, room: int, navigation: int | None = None) -> Slots:
    """Lay the slots of a driving prompt out.

    Args:
        prompt: With or without history filled in.
        config: What is looked at.
        room: Slots for the last tokens.
        navigation: Tokens of a navigation text, delimiters included, that the prompt is to be taken to have; by default
            its own.

    Raises:
        InputError: A question, which has no history.
    """
    if prompt.history_span is None:
        raise InputError("a driving prompt is required, found a question, which has no ego history")
    own = 0 if prompt.nav_span is None else prompt.nav_span[1] - prompt.nav_span[0]
    added = own if navigation is None else navigation
    length = len(prompt.ids) - own + added
    index = torch.arange(length - room, length)
    start, end = prompt.history_span
    is_history = (index >= start) & (index < end)
    is_route = (index > end) & (index <= end + added)  # behind the token that closes the history
    tail = torch.full((room,), HIDDEN)
    masks = {"history": is_history, "navigation": is_route, "instruction": (index >= end) & ~is_route}
    for name, mask in masks.items():
        if name in config.parts:
            tail[mask] = PARTS.index(name)
    kinds = torch.cat((torch.zeros(cell_count(prompt, config), dtype=torch.int64), tail))
    base = length + prompt.rope_delta if config.rotary == "mrope" else length
    return Slots(kinds, _positions(prompt, config, kinds, index), base)


def cell_count(prompt: Prompt, config: DrafterConfig) -> int:
    """Slots that images take."""
    if "images" not in config.parts:
        return 0
    return len(prompt.images) * config.image_cells[0] * config.image_cells[1]


@lru_cache(maxsize=16)
def cell_weights(prompt: Prompt, cells: tuple[int, int]) -> Tensor:
    """What makes cells of image tokens: float32 [cells of all images, image tokens], rows that sum to one."""
    blocks = [_image_cells(image, cells) for image in prompt.images]
    return torch.block_diag(*blocks)


def _image_cells(image: ImageSpan, cells: tuple[int, int]) -> Tensor:
    """The same for one image; edges as in adaptive average pooling."""
    rows, cols = _edges(image.rows, cells[0]), _edges(image.cols, cells[1])
    inside = rows[:, None, :, None] * cols[None, :, None, :]
    return inside.flatten(2).flatten(0, 1)


def _edges(size: int, cells: int) -> Tensor:
    """Share of each of `size` lines in the mean of each cell, [cells, size]."""
    share = torch.zeros(cells, size)
    for i in range(cells):
        first, last = i * size // cells, -(-(i + 1) * size // cells)
        share[i, first:last] = 1 / (last - first)
    return share


def _positions(prompt: Prompt, config: DrafterConfig, kinds: Tensor, index: Tensor) -> Tensor:
    """float32 [3, S]."""
    if config.rotary == "local":
        seen = kinds >= 0  # one behind the other up to the context states, which begin at 0
        rank = seen.cumsum(0) - seen.sum() - 1
        return rank.float().expand(3, -1)
    tail = (index + prompt.rope_delta if config.rotary == "mrope" else index).float().expand(3, -1)
    if not cell_count(prompt, config):
        return tail
    weights = cell_weights(prompt, config.image_cells)
    return torch.cat((_token_positions(prompt, config.rotary) @ weights.T, tail), dim=1)


def _token_positions(prompt: Prompt, rotary: Rotary) -> Tensor:
    """Of all image tokens, float32 [3, image tokens]."""
    tokens = prompt.image_index
    return prompt.positions[:, tokens].float() if rotary == "mrope" else tokens.float().expand(3, -1)
