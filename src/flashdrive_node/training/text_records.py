"""What a drafter learns from: texts that the target itself wrote, with the hidden states that it had while writing.

Texts are drawn at the temperature of the deployment. States are taken in a pass over prompt and text, history tokens
filled in, so they are those that speculative decoding hands to the drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.protocol import Observation
from flashdrive_node.engine.taps import Taps
from flashdrive_node.evaluation.clip import ClipSource
from flashdrive_node.model import batched
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.training.drives import DriveJob
from flashdrive_node.training.pictures import Photographer
from flashdrive_node.training.source import WindowSource


class Scenes(NamedTuple):
    """Inputs of B windows, as `BatchedPolicy.plan` takes them."""

    #: uint8 [B, cameras, frames, H, W, 3].
    images: Tensor
    #: float32 [B, 16, 3] and [B, 16, 3, 3].
    history_xyz: Tensor
    history_rot: Tensor
    navigation: Sequence[str | None]


@dataclass(frozen=True)
class TextRecords:
    """N texts of the target, on its device."""

    #: The generated tokens up to and with the stop token, int64 [N, L]; behind a text's end stands -1.
    tokens: Tensor
    #: Tapped states of the target's last tokens before each generated one, [N, context_length - 1 + L, context_size]:
    #: what is known when token j comes stands at j .. j + context_length - 1.
    states: Tensor
    #: States behind the target's final norm that token j was drawn from, [N, L, hidden].
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, int64 [N]."""
        return (self.tokens >= 0).sum(dim=1)

    def rows(self, index: Tensor) -> TextRecords:
        """Texts at these rows."""
        return TextRecords(self.tokens[index], self.states[index], self.hidden[index])


def join_records(parts: Sequence[TextRecords]) -> TextRecords:
    """Records one behind the other.

    Raises:
        InputError: Nothing to join.
    """
    if not parts:
        raise InputError("texts to learn from are required, found none")
    return TextRecords(*(torch.cat(one) for one in zip(*((p.tokens, p.states, p.hidden) for p in parts), strict=True)))


class TextRecorder:
    """Lets the target write, and keeps what it had in mind."""

    def __init__(self, policy: BatchedPolicy, layer_ids: tuple[int, ...], context_length: int):
        """Keep the target.

        Args:
            policy: The target with its sampling; texts longer than its limit are cut and have no stop token.
            layer_ids: Layers whose outputs are tapped.
            context_length: Of the drafter.
        """
        self.policy, self.layer_ids, self.context_length = policy, layer_ids, context_length

    @torch.no_grad()
    def record(self, scenes: Scenes) -> TextRecords:
        """Texts of B windows."""
        policy, model = self.policy, self.policy.model
        layout = policy.layout(scenes.images)
        history = encode_history(scenes.history_xyz, scenes.history_rot, model.config)
        prompts = layout.build(history, scenes.navigation)
        features = batched.encode_images(model, scenes.images)
        positions = layout.positions(prompts.ids.shape[1])
        hidden, keys, values = batched.prefill(model, prompts.ids, positions, features, layout.image_index)
        context = BatchContext(keys, values, prompts.prompt_lengths, layout.rope_delta)
        logits = model.language.logits(batched.last_hidden(hidden, prompts.prompt_lengths))
        texts = batched.decode(model, context, logits, policy.sampling, policy.rule, policy.generator).rows()

        longest, lead = policy.sampling.max_length, self.context_length - 1
        told = layout.build(history, scenes.navigation, texts)
        taps = Taps(self.layer_ids)
        positions = layout.positions(told.ids.shape[1])
        hidden, _, _ = batched.prefill(model, told.ids, positions, features, layout.image_index, taps.observe)
        # Token j comes of the state one place before it.
        first = prompts.prompt_lengths[:, None] - 1
        place = first - lead + torch.arange(lead + longest, device=first.device)
        place = place.clamp(max=told.ids.shape[1] - 1)
        rows = torch.arange(len(texts), device=first.device)[:, None]
        tokens = torch.tensor([text + [-1] * (longest - len(text)) for text in texts], device=first.device)
        return TextRecords(tokens, taps.states()[rows, place], hidden[rows, place[:, lead:]])


def world_scenes(job: DriveJob, batch: int, device: torch.device, workers: int, compiled: bool) -> Iterator[Scenes]:
    """Windows of the world without end: disturbed drives of the expert, see `training.drives`.

    Args:
        job: The first drives; the next ones take the scenes behind them.
        batch: Windows at a time.
        device: Where they are rendered.
        workers: Processes that compute drives.
        compiled: See `world.render.render`.
    """
    photographer, source = Photographer(batch, compiled=compiled), WindowSource(job, workers)
    try:
        for windows in source:
            for start in range(0, len(windows), batch):
                rows = torch.arange(start, min(start + batch, len(windows)))
                some = windows.rows(rows).to(device)
                images = photographer.shoot(some).images
                yield Scenes(images, some.history_xyz, some.history_rot, some.navigation)
    finally:
        source.close()


def clip_scenes(
    source: ClipSource, batch: int, device: torch.device, wanted: Callable[[int], bool]
) -> Iterator[Scenes]:
    """Windows of recorded clips.

    Args:
        source: The clips.
        batch: Windows at a time.
        device: Where they are wanted.
        wanted: Whether to take the clip of this number.
    """
    for number, clip in enumerate(source.clips()):
        if not wanted(number):
            continue
        held: list[Observation] = []
        for window in clip.windows:
            held.append(window.observation)
            if len(held) == batch:
                yield stacked(held, device)
                held = []
        if held:
            yield stacked(held, device)


def stacked(observations: Sequence[Observation], device: torch.device) -> Scenes:
    """Observations as one batch.

    Raises:
        InputError: Pictures of different sizes.
    """
    shapes = {tuple(i.shape for c in o.cameras for i in c.images) for o in observations}
    if len(shapes) != 1 or len(set(next(iter(shapes)))) != 1:
        raise InputError(f"pictures of one size are required, found {sorted(set().union(*shapes))}")
    images = np.stack([np.stack([np.stack(c.images) for c in o.cameras]) for o in observations])
    return Scenes(
        torch.from_numpy(images).to(device),
        torch.stack([torch.from_numpy(o.ego_history_xyz) for o in observations]).to(device),
        torch.stack([torch.from_numpy(o.ego_history_rot) for o in observations]).to(device),
        [o.nav_text for o in observations],
    )


def take(recorder: TextRecorder, scenes: Iterable[Scenes], texts: int) -> Iterator[TextRecords]:
    """Records until there are so many, or no more scenes."""
    count = 0
    for some in scenes:
        records = recorder.record(some)
        count += len(records)
        yield records
        if count >= texts:
            return
