"""Prompts of the two public models: text, image places, history places, and M-RoPE positions.

    system turn, user turn: images camera by camera, oldest frame first | ego history | [navigation] | instruction

Alpamayo 1.5 names cameras and numbers frames; R1 has the bare images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import PromptError
from flashdrive_node.model.tokenizer import AlpamayoTokenizer

#: Camera names by the model's camera index.
CAMERA_NAMES = (
    "Front left camera",
    "Front camera",
    "Front right camera",
    "Rear left camera",
    "Rear camera",
    "Rear right camera",
    "Front telephoto camera",
)

SYSTEM_TEXT = "You are a driving assistant that generates safe and accurate actions."
INSTRUCTION = "output the chain-of-thought reasoning of the driving process, then output the future trajectory."

#: Instructions such as "Turn left onto De La Cruz Boulevard in 40m" (12 tokens) are what the model was trained on; the
#: limit leaves room for long street names and bounds what an outside sender can add to every window.
MAX_NAV_CHARACTERS = 200
MAX_NAV_TOKENS = 64

#: A question may be a paragraph, and is answered once; still small beside the thousands of image tokens.
MAX_QUESTION_CHARACTERS = 1000
MAX_QUESTION_TOKENS = 256


@dataclass(frozen=True)
class ImageSpan:
    """Where the tokens of one image stand."""

    #: Index of the first image token in the prompt.
    start: int
    #: Image tokens (merged groups of patches), row by row.
    rows: int
    cols: int
    #: 0 to 6, see `CAMERA_NAMES`.
    camera_index: int
    #: 0 is the oldest frame.
    frame: int

    @property
    def count(self) -> int:
        """Number of image tokens."""
        return self.rows * self.cols

    @property
    def end(self) -> int:
        """Index behind the last image token."""
        return self.start + self.count


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with every image expanded, and where things stand. Prompts are shared: do not write to tensors."""

    #: int64 [T].
    ids: Tensor
    #: M-RoPE positions of time, height and width: int64 [3, T].
    positions: Tensor
    #: Position of a generated token minus its index in the sequence.
    rope_delta: int
    #: In the order of the image tokens: camera by camera, oldest frame first.
    images: tuple[ImageSpan, ...]
    #: First index of the ego-history tokens and the index behind the last, or None for a question.
    history_span: tuple[int, int] | None
    #: The same for the navigation text with its two delimiters, or None.
    nav_span: tuple[int, int] | None
    camera_indices: tuple[int, ...]
    frames_per_camera: int
    #: Rows and columns of patches per image, as the vision tower takes them.
    grids: tuple[tuple[int, int], ...]

    @property
    def image_index(self) -> Tensor:
        """Indices of all image tokens in order, int64 [image tokens]."""
        return torch.cat([torch.arange(image.start, image.end) for image in self.images])


def driving_prompt(
    tokenizer: AlpamayoTokenizer,
    config: AlpamayoConfig,
    camera_indices: Sequence[int],
    frames_per_camera: int,
    grids: Sequence[tuple[int, int]],
    nav_text: str | None = None,
) -> Prompt:
    """Prompt for reasoning and trajectory, with placeholders where `fuse_history` puts the ego history.

    Args:
        tokenizer: Extended tokenizer of the checkpoint.
        config: Layout of the prompt.
        camera_indices: Ascending, each once, 0 to 6.
        frames_per_camera: Frames of each camera, 4 in the release.
        grids: Rows and columns of patches, one pair per image, camera by camera; equal within a camera.
        nav_text: Untrusted navigation instruction such as "Turn right in 30m".

    Raises:
        PromptError: Cameras, frames, grids or text that no prompt can be built from.
    """
    if nav_text is not None and not config.supports_navigation:
        raise PromptError(f"navigation text needs Alpamayo 1.5, the checkpoint is {config.model_type!r}")
    cameras, pairs = _checked_layout(config, camera_indices, frames_per_camera, grids)
    return _driving_prompt(tokenizer, config, cameras, frames_per_camera, pairs, nav_text)


def request_ids(tokenizer: AlpamayoTokenizer) -> list[int]:
    """How every driving prompt ends: the instruction, and the beginning of the answer."""
    return tokenizer.encode(f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n<|cot_start|>")


def question_prompt(
    tokenizer: AlpamayoTokenizer,
    config: AlpamayoConfig,
    camera_indices: Sequence[int],
    frames_per_camera: int,
    grids: Sequence[tuple[int, int]],
    question: str,
) -> Prompt:
    """Prompt for a question about the images, without ego history. Arguments and errors as in `driving_prompt`."""
    if not config.supports_navigation:
        raise PromptError(f"questions need Alpamayo 1.5, the checkpoint is {config.model_type!r}")
    cameras, pairs = _checked_layout(config, camera_indices, frames_per_camera, grids)
    text = tokenizer.encode_untrusted(question, "question", MAX_QUESTION_CHARACTERS, MAX_QUESTION_TOKENS)
    ids, images = _image_part(tokenizer, config, cameras, frames_per_camera, pairs)
    tail = [tokenizer.id("question_start"), *text, tokenizer.id("question_end")]
    tail += tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<|answer_start|>")
    return _assemble([*ids, *tail], images, None, None, cameras, frames_per_camera, pairs)


def without_navigation(prompt: Prompt) -> Prompt:
    """The prompt as it would be without its navigation text; itself where it has none."""
    if prompt.nav_span is None:
        return prompt
    start, end = prompt.nav_span
    # Images and history stand in front of the navigation text: only plain text moves.
    positions = torch.cat((prompt.positions[:, :start], prompt.positions[:, end:] - (end - start)), dim=1)
    ids = torch.cat((prompt.ids[:start], prompt.ids[end:]))
    return replace(prompt, ids=ids, positions=positions, nav_span=None)


def fuse_history(prompt: Prompt, history_tokens: Tensor) -> Prompt:
    """The prompt with its history placeholders replaced by token ids, int64 [history tokens].

    Raises:
        PromptError: The prompt has no history, or another number of tokens.
    """
    if prompt.history_span is None:
        raise PromptError("a driving prompt is required, found a question prompt, which has no ego history")
    start, end = prompt.history_span
    if history_tokens.shape != (end - start,):
        raise PromptError(f"history tokens [{end - start}] are required, found {list(history_tokens.shape)}")
    ids = prompt.ids.clone()
    ids[start:end] = history_tokens
    return replace(prompt, ids=ids)


def mrope_positions(length: int, images: Sequence[ImageSpan]) -> Tensor:
    """Positions of time, height and width, int64 [3, length].

    Text counts up on all three axes. Image token (r, c) stands at (b, b + r, b + c), where b is the next position;
    behind an image it goes on at b + max(rows, cols).
    """
    parts: list[Tensor] = []
    index = position = 0
    for image in images:
        text = image.start - index
        parts.append(torch.arange(position, position + text).expand(3, -1))
        position += text
        row = torch.arange(image.rows).repeat_interleave(image.cols)
        col = torch.arange(image.cols).repeat(image.rows)
        parts.append(torch.stack((torch.zeros_like(row), row, col)) + position)
        position += max(image.rows, image.cols)
        index = image.end
    parts.append(torch.arange(position, position + length - index).expand(3, -1))
    return torch.cat(parts, dim=1)


def _checked_layout(
    config: AlpamayoConfig, camera_indices: Sequence[int], frames: int, grids: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    cameras = tuple(int(i) for i in camera_indices)
    if not cameras:
        raise PromptError("cameras: at least one is required, found none")
    unknown = [i for i in cameras if not 0 <= i < len(CAMERA_NAMES)]
    if unknown:
        raise PromptError(f"cameras: indices 0 to {len(CAMERA_NAMES) - 1} are required, found {unknown}")
    repeated = sorted({i for i in cameras if cameras.count(i) > 1})
    if repeated:
        raise PromptError(f"cameras: each index once is required, found {repeated} more than once in {list(cameras)}")
    if list(cameras) != sorted(cameras):
        raise PromptError(f"cameras: ascending indices are required, found {list(cameras)}")
    if frames < 1:
        raise PromptError(f"frames per camera: at least 1 is required, found {frames}")
    pairs = tuple((int(rows), int(cols)) for rows, cols in grids)
    if len(pairs) != len(cameras) * frames:
        raise PromptError(
            f"images: {len(cameras)} camera(s) x {frames} frame(s) = {len(cameras) * frames} are required, found "
            f"{len(pairs)}"
        )
    merge = config.vision.spatial_merge_size
    for i, camera in enumerate(cameras):
        own = pairs[i * frames : (i + 1) * frames]
        if len(set(own)) > 1:
            raise PromptError(f"camera {camera}: frames of one size are required, found patch grids {sorted(set(own))}")
        if min(own[0]) < merge or own[0][0] % merge or own[0][1] % merge:
            raise PromptError(f"camera {camera}: a patch grid of multiples of {merge} is required, found {own[0]}")
    return cameras, pairs


# A node asks for the same layout window after window; navigation text changes now and then.
@lru_cache(maxsize=16)
def _driving_prompt(
    tokenizer: AlpamayoTokenizer,
    config: AlpamayoConfig,
    cameras: tuple[int, ...],
    frames: int,
    grids: tuple[tuple[int, int], ...],
    nav_text: str | None,
) -> Prompt:
    route: list[int] = []
    if nav_text is not None:
        text = tokenizer.encode_untrusted(nav_text, "navigation text", MAX_NAV_CHARACTERS, MAX_NAV_TOKENS)
        route = [tokenizer.id("route_start"), *text, tokenizer.id("route_end")]
    ids, images = _image_part(tokenizer, config, cameras, frames, grids)
    ids.append(tokenizer.id("traj_history_start"))
    history = (len(ids), len(ids) + config.tokens_per_history_traj)
    ids += [tokenizer.id("traj_history")] * config.tokens_per_history_traj
    ids.append(tokenizer.id("traj_history_end"))
    nav = (len(ids), len(ids) + len(route)) if route else None
    ids += route
    ids += request_ids(tokenizer)
    return _assemble(ids, images, history, nav, cameras, frames, grids)


def _image_part(
    tokenizer: AlpamayoTokenizer,
    config: AlpamayoConfig,
    cameras: tuple[int, ...],
    frames: int,
    grids: tuple[tuple[int, int], ...],
) -> tuple[list[int], list[ImageSpan]]:
    """Everything from the start of the prompt to the end of the last image."""
    merge = config.vision.spatial_merge_size
    pad = tokenizer.id("image_pad")
    ids: list[int] = []
    images: list[ImageSpan] = []
    text = f"<|im_start|>system\n{SYSTEM_TEXT}<|im_end|>\n<|im_start|>user\n"
    for i, camera in enumerate(cameras):
        if config.include_camera_ids:
            text += f"{CAMERA_NAMES[camera]}: "
        for frame in range(frames):
            if config.include_frame_nums:
                text += f"frame {frame} "
            # Text between two images is encoded as one run: words must not be cut where its parts meet.
            ids += tokenizer.encode(text + "<|vision_start|>")
            rows, cols = grids[i * frames + frame]
            image = ImageSpan(len(ids), rows // merge, cols // merge, camera, frame)
            images.append(image)
            ids += [pad] * image.count
            text = "<|vision_end|>"
    return ids + tokenizer.encode(text), images


def _assemble(
    ids: list[int],
    images: list[ImageSpan],
    history_span: tuple[int, int] | None,
    nav_span: tuple[int, int] | None,
    cameras: tuple[int, ...],
    frames: int,
    grids: tuple[tuple[int, int], ...],
) -> Prompt:
    positions = mrope_positions(len(ids), images)
    rope_delta = int(positions.max()) + 1 - len(ids)
    return Prompt(
        torch.tensor(ids), positions, rope_delta, tuple(images), history_span, nav_span, cameras, frames, grids
    )
