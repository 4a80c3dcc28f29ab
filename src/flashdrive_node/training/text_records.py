"""What a drafter learns from: texts that the target itself wrote, with the hidden states that it had while writing.

Texts are drawn at the temperature of the deployment. States are those of the pass that wrote the text, with its keys
and values (of whole windows, or of streams that keep some), so they are what speculative decoding hands to the drafter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.prompt_slots import cell_weights
from flashdrive_node.engine.protocol import Observation
from flashdrive_node.engine.taps import Taps
from flashdrive_node.evaluation.clip import ClipSource
from flashdrive_node.model import batched
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.prompt import Prompt
from flashdrive_node.model.prompt_batch import PromptBatch, PromptLayout
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
    #: Tapped states of the target's last `lead` tokens before each generated one, [N, lead - 1 + L, context_size]: what
    #: is known when token j comes stands at j .. j + lead - 1.
    states: Tensor
    #: States behind the target's final norm that token j was drawn from, [N, L, hidden].
    hidden: Tensor
    #: Averaged embeddings of the window's images, [N, cells, hidden]; no cells where they were not asked for.
    cells: Tensor
    #: Tokens of the navigation text with its delimiters, int64 [N].
    navigation: Tensor
    #: Number of the clip that the window is of, and whether the scene has just changed in it, int64 [N].
    clips: Tensor
    changed: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lead(self) -> int:
        """States in front of a text's first token that are kept, its own included."""
        return self.states.shape[1] - self.tokens.shape[1] + 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, int64 [N]."""
        return (self.tokens >= 0).sum(dim=1)

    def rows(self, index: Tensor) -> TextRecords:
        """Texts at these rows."""
        return TextRecords(*(getattr(self, f.name)[index] for f in fields(self)))


def join_records(parts: Sequence[TextRecords]) -> TextRecords:
    """Records one behind the other.

    Raises:
        InputError: Nothing to join.
    """
    if not parts:
        raise InputError("texts to learn from are required, found none")
    return TextRecords(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TextRecords)))


class TextRecorder:
    """Lets the target write, and keeps what it had in mind."""

    def __init__(
        self,
        policy: BatchedPolicy,
        layer_ids: tuple[int, ...],
        lead: int,
        image_cells: tuple[int, int] | None = None,
    ):
        """Keep the target.

        Args:
            policy: The target with its sampling; texts longer than its limit are cut and have no stop token.
            layer_ids: Layers whose outputs are tapped.
            lead: States in front of a text that are kept, see `TextRecords.lead`.
            image_cells: Rows and columns that images are averaged to; by default none are kept.
        """
        self.policy, self.layer_ids, self.lead, self.image_cells = policy, layer_ids, lead, image_cells
        #: Of the windows so far, without navigation text.
        self.prompt: Prompt | None = None
        self._written = 0

    @torch.no_grad()
    def record(self, scenes: Scenes) -> TextRecords:
        """Texts of B windows, each computed whole; every one counts as a clip of its own."""
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
        records = self.told(layout, context, prompts, texts, features.embeds)
        clips = torch.arange(self._written, self._written + len(texts), device=model.device)
        self._written += len(texts)
        return replace(records, clips=clips)

    @torch.no_grad()
    def told(
        self,
        layout: PromptLayout,
        context: BatchContext,
        prompts: PromptBatch,
        texts: Sequence[Sequence[int]],
        embeddings: Tensor,
    ) -> TextRecords:
        """Records of texts that have been written.

        Args:
            layout: Of the prompts.
            context: Holds prompts and texts.
            prompts: What the texts were written behind.
            texts: The generated tokens.
            embeddings: Of all image tokens, [B, image tokens, hidden].
        """
        model, device, lead = self.policy.model, self.policy.model.device, self.lead
        longest, rows = self.policy.sampling.max_length, torch.arange(len(texts), device=device)[:, None]
        tokens = torch.tensor([[*text, *[-1] * (longest - len(text))] for text in texts], device=device)
        # The last tokens of the prompts and the texts but for their last token: token j comes of the one before it.
        steps = torch.arange(lead + longest - 1, device=device)
        first = prompts.prompt_lengths - lead
        inside = prompts.ids[rows, (first[:, None] + steps).clamp(0, prompts.ids.shape[1] - 1)]
        written = tokens[rows, (steps - lead).clamp(min=0).expand(len(texts), -1)].clamp(min=0)
        taps = Taps(self.layer_ids)
        ids = torch.where(steps < lead, inside, written)
        hidden = batched.run_behind(model, context, ids, first, write=False, observe=taps.observe)
        self.prompt = layout.prompt
        if self.image_cells is None:
            cells = embeddings[:, :0]
        else:
            cells = cell_weights(layout.prompt, self.image_cells).to(device, embeddings.dtype) @ embeddings
        plain = len(layout.prompt.ids)
        none = torch.zeros(len(texts), dtype=torch.int64, device=device)
        return TextRecords(
            tokens, taps.states(), hidden[:, lead - 1 :], cells, prompts.prompt_lengths - plain, none, none
        )


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


def clip_scenes(source: ClipSource, batch: int, device: torch.device) -> Iterator[Scenes]:
    """Windows of recorded clips.

    Args:
        source: The clips.
        batch: Windows at a time.
        device: Where they are wanted.
    """
    for clip in source.clips():
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


def recorded(recorder: TextRecorder, scenes: Generator[Scenes] | Iterable[Scenes]) -> Iterator[TextRecords]:
    """Texts of scenes, batch by batch; the source of the scenes is closed with this one."""
    try:
        for some in scenes:
            yield recorder.record(some)
    finally:
        if isinstance(scenes, Generator):
            scenes.close()  # ends the processes behind it
