"""What a window has in common with the one before: which images stay, and which tokens are computed anew.

In the order of the prompt, which is camera by camera, a token sees all slots in front of it. So tokens that are
computed while others are kept need no mask but causality: each sees the slots up to its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flashdrive_node.engine.kernels.ageing import Moves, chained
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.prompt import ImageSpan, Prompt

#: full: every window from scratch. features: vision features of kept images are used again, which changes nothing.
#: kv: their keys and values too, which is the approximation that makes streaming fast.
Mode = Literal["full", "features", "kv"]


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Tokens of a prompt that are computed, while others may be kept."""

    #: Their slots, ascending, int64 [T].
    slots: Tensor
    #: Whether these are all slots of the prompt, and whether the last is among them.
    whole: bool
    last: bool
    #: Rows that hold image tokens, and which image token each is: int64 [image rows].
    image_rows: Tensor
    image_tokens: Tensor
    #: The place among all image tokens of each row, int64 [T]; behind the last for rows that hold none.
    places: Tensor


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """How to get from one window to the next. Image tokens are counted over all images in the order of the prompt."""

    #: Without history. Tensors below are on the model's device.
    prompt: Prompt
    #: int64 [3, T], and slots of all image tokens.
    positions: Tensor
    image_index: Tensor
    #: Images that the vision tower runs on, as indices into the prompt's images, and their image tokens.
    encode: tuple[int, ...]
    encode_tokens: Tensor
    #: Image tokens that go to another place, their frame having become older.
    moves: Moves
    #: Tokens to compute; all of them where nothing is kept.
    rows: RowPlan

    @property
    def tensors(self) -> list[Tensor]:
        """Everything on the device, in a fixed order."""
        rows, moves = self.rows, self.moves
        own = [self.positions, self.image_index, self.encode_tokens, moves.source, moves.target, moves.chains]
        return [*own, rows.slots, rows.image_rows, rows.image_tokens, rows.places]

    @property
    def structure(self) -> Hashable:
        """Equal for plans that take the same computation, on other tokens."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors), self.rows.whole, self.rows.last

    def clone(self) -> WindowPlan:
        """A copy with tensors of its own, which may be written to."""
        rows = replace(
            self.rows,
            slots=self.rows.slots.clone(),
            image_rows=self.rows.image_rows.clone(),
            image_tokens=self.rows.image_tokens.clone(),
            places=self.rows.places.clone(),
        )
        return replace(
            self,
            positions=self.positions.clone(),
            image_index=self.image_index.clone(),
            encode_tokens=self.encode_tokens.clone(),
            moves=Moves(self.moves.source.clone(), self.moves.target.clone(), self.moves.chains.clone()),
            rows=rows,
        )


def match_frames(
    old: Sequence[Sequence[int]] | None, new: Sequence[Sequence[int]]
) -> tuple[tuple[int | None, ...], ...]:
    """Where the frames of a window stood in the one before, camera by camera, by their stamps.

    Args:
        old: Stamps of the previous window per camera, or None where nothing is kept.
        new: Stamps of this window, ascending in each camera.

    Returns:
        Per camera and frame the index of that frame before, or None for a new one.

    Raises:
        InputError: Stamps of a camera do not ascend, or cameras have unequal numbers of frames.
    """
    problems = [
        f"camera {i}: ascending stamps are required, found {list(stamps)}"
        for i, stamps in enumerate(new)
        if any(b <= a for a, b in pairwise(stamps))
    ]
    if len({len(stamps) for stamps in new}) > 1:
        problems.append(f"equally many frames per camera are required, found {[len(stamps) for stamps in new]}")
    if problems:
        raise InputError("; ".join(problems))
    if old is None:
        return tuple((None,) * len(stamps) for stamps in new)
    places = [{stamp: i for i, stamp in enumerate(stamps)} for stamps in old]
    return tuple(tuple(place.get(stamp) for stamp in stamps) for place, stamps in zip(places, new, strict=True))


# A stream goes through the same few plans over and over: one new frame per camera, two after a missed tick, ...
@lru_cache(maxsize=64)
def plan_window(
    prompt: Prompt,
    sources: tuple[tuple[int | None, ...], ...],
    mode: Mode,
    refreshed: tuple[int, ...],
    device: torch.device,
    span: tuple[int, int | None] = (0, None),
) -> WindowPlan:
    """Plan a window.

    Args:
        prompt: Without history.
        sources: Of `match_frames`.
        mode: What is kept of images that stay.
        refreshed: Cameras, by their place in the window, whose kept images are computed anew in the language model.
        device: Where index tensors are wanted.
        span: First camera, by its place, whose text and images may be computed, and the camera behind the last; None
            is to the end of the prompt.
    """
    images = prompt.images
    flat = [source for camera in sources for source in camera]
    if mode == "full":
        flat = [None] * len(images)
    frames = prompt.frames_per_camera
    # Place of the first token of each image among all image tokens.
    offsets = [0]
    for image in images:
        offsets.append(offsets[-1] + image.count)

    def tokens(chosen: Sequence[int]) -> Tensor:
        parts = [torch.arange(offsets[i], offsets[i + 1]) for i in chosen]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    encode = tuple(i for i, source in enumerate(flat) if source is None)
    before = [None if source is None else i // frames * frames + source for i, source in enumerate(flat)]
    moved = [(j, i) for i, j in enumerate(before) if j is not None and j != i]
    moves = chained(moved, [image.count for image in images], offsets)
    kept = [i for i in range(len(images)) if i not in encode and i // frames not in refreshed]
    ends = [0, *(image.end for image in images[frames - 1 :: frames])]  # behind each camera's text and images
    slots = ends[span[0]], len(prompt.ids) if span[1] is None else ends[span[1]]
    rows = _row_plan(len(prompt.ids), slots, images, offsets, set(kept) if mode == "kv" else set(), device)
    return WindowPlan(
        prompt=prompt,
        positions=prompt.positions.to(device),
        image_index=prompt.image_index.to(device),
        encode=encode,
        encode_tokens=tokens(encode).to(device),
        moves=Moves(moves.source.to(device), moves.target.to(device), moves.chains.to(device)),
        rows=rows,
    )


def _row_plan(
    length: int,
    span: tuple[int, int],
    images: tuple[ImageSpan, ...],
    offsets: list[int],
    kept: set[int],
    device: torch.device,
) -> RowPlan:
    """Rows between two slots of a prompt of so many tokens."""
    computed = torch.zeros(length, dtype=torch.bool)
    computed[slice(*span)] = True
    if kept:
        computed[: images[0].start] = False  # nothing that changes stands in front of the first image
    token_of_slot = torch.full((length,), -1)
    for i, image in enumerate(images):
        token_of_slot[image.start : image.end] = torch.arange(offsets[i], offsets[i + 1])
        if i in kept:
            computed[image.start : image.end] = False
    slots = computed.nonzero()[:, 0]
    image_rows = (token_of_slot[slots] >= 0).nonzero()[:, 0]
    has_image = token_of_slot[slots] >= 0
    return RowPlan(
        slots=slots.to(device),
        whole=len(slots) == length,
        last=bool(computed[-1]),
        image_rows=image_rows.to(device),
        image_tokens=token_of_slot[slots[image_rows]].to(device),
        places=torch.where(has_image, token_of_slot[slots], offsets[-1]).to(device),
    )
