"""The prompt pass of many streams side by side: what `Stream` keeps and computes for one, for rows of a batch.

Images stand in front of all that differs between rows, so rows whose frames moved alike share one plan and one pass.
Keys are kept before rotation only, and rotated for the places where their frames stand when a window is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import embedding

from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.window_plan import WindowPlan, match_frames, plan_window
from flashdrive_node.model import batched
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.decoder import DecoderLayer
from flashdrive_node.model.prompt_batch import PromptBatch, PromptLayout
from flashdrive_node.model.rope import mrope_cos_sin, rotate

#: Frames of some rows of a batch: given the rows and indices of images in the order of the prompt, uint8 [rows, images,
#: H, W, 3] on the model's device.
Frames = Callable[[Sequence[int], Sequence[int]], Tensor]
#: Per camera the stamps of its frames, ascending.
Stamps = tuple[tuple[int, ...], ...]


class BatchedStreams:
    """State of L streams. Their windows are of one layout, and of any stamps."""

    def __init__(self, model: Alpamayo, layout: PromptLayout, lanes: int, settings: StreamSettings):
        """Begin streams that have seen nothing.

        Args:
            model: The network.
            layout: Of every window.
            lanes: L.
            settings: What is kept; `reset` may change refreshes lane by lane.
        """
        self.model, self.layout = model, layout
        self._settings = [settings] * lanes
        self._stamps: list[Stamps | None] = [None] * lanes
        #: Windows of each stream since its last reset.
        self.windows = [0] * lanes
        config, tokens = model.config.text, len(layout.image_index)
        levels = 1 + len(model.vision.deepstack_mergers)

        def room(*shape: int) -> Tensor:
            return torch.zeros(shape, device=model.device, dtype=model.dtype)

        # Per image token: embedding and DeepStack features.
        self._features = room(levels, lanes, tokens, config.hidden_size)
        kept = (config.num_layers, lanes, tokens, config.num_kv_heads, config.head_dim)
        #: Keys before rotation and values; None in modes that keep none.
        self._kept = (room(*kept), room(*kept)) if settings.mode == "kv" else None

    def reset(self, lane: int, settings: StreamSettings | None = None) -> None:
        """Forget a stream's windows, and from now on refresh it by other settings of the same mode."""
        self._stamps[lane], self.windows[lane] = None, 0
        self._settings[lane] = settings or self._settings[lane]

    def read(
        self, lanes: Sequence[int], stamps: Sequence[Stamps], frames: Frames, prompts: PromptBatch
    ) -> tuple[BatchContext, Tensor]:
        """Bring streams to their next windows.

        Args:
            lanes: The streams, each once; one row of the batch each.
            stamps: Of the rows' frames.
            frames: Asked for the frames that are new.
            prompts: The rows' prompts.

        Returns:
            Contexts in tensors of their own, and the logits of the first generated tokens [B, vocabulary].

        Raises:
            InputError: Stamps that do not ascend, or of another layout.
        """
        plans = [self._plan(lane, stamp) for lane, stamp in zip(lanes, stamps, strict=True)]
        groups: dict[WindowPlan, list[int]] = {}
        for row, plan in enumerate(plans):
            groups.setdefault(plan, []).append(row)
        for lane in lanes:
            self._stamps[lane] = None  # nothing may be kept of windows that did not come through
        parts = [self._compute(plan, rows, lanes, frames, prompts) for plan, rows in groups.items()]
        for lane, stamp in zip(lanes, stamps, strict=True):
            self._stamps[lane] = stamp
            self.windows[lane] += 1
        keys, values, logits = parts[0]
        if len(parts) > 1:
            order = torch.tensor([row for rows in groups.values() for row in rows], device=self.model.device).argsort()
            keys, values = (
                [torch.cat(layer)[order] for layer in zip(*(part[i] for part in parts), strict=True)] for i in (0, 1)
            )
            logits = torch.cat([part[2] for part in parts])[order]
        return BatchContext(keys, values, prompts.prompt_lengths, self.layout.rope_delta), logits

    def embeddings(self, lanes: Sequence[int]) -> Tensor:
        """Embeddings of all image tokens of some streams' last windows, [lanes, image tokens, hidden]."""
        return self._features[0, torch.tensor(lanes, device=self._features.device)]

    def _plan(self, lane: int, stamps: Stamps) -> WindowPlan:
        """What a lane's next window takes; the same object for equal plans."""
        settings = self._settings[lane]
        sources = match_frames(self._stamps[lane], stamps)
        refreshed = settings.refreshed(self.windows[lane], len(stamps))
        return plan_window(self.layout.prompt, sources, settings.mode, refreshed, self.model.device)

    def _compute(
        self, plan: WindowPlan, rows: list[int], lanes: Sequence[int], frames: Frames, prompts: PromptBatch
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Keys, values [g, kv_heads, T, head_dim] per layer, and logits of rows of one plan."""
        model, device = self.model, self.model.device
        at = torch.tensor([lanes[row] for row in rows], device=device)
        ids = prompts.ids[torch.tensor(rows, device=device)] if len(rows) < len(prompts.ids) else prompts.ids
        lengths = prompts.prompt_lengths[torch.tensor(rows, device=device)]
        # Where what now stands in a place stood before.
        moved = torch.arange(len(plan.image_index), device=device)
        moved[plan.moves.target] = plan.moves.source
        features = self._features[:, at][:, :, moved]
        if plan.encode:
            new = batched.encode_images(model, frames(rows, plan.encode)[:, None])
            for level, tensor in enumerate((new.embeds, *new.deepstack)):
                features[level].index_copy_(1, plan.encode_tokens, tensor)
        self._features[:, at] = features
        kept = None
        if self._kept is not None:
            kept = self._kept[0][:, at][:, :, moved], self._kept[1][:, at][:, :, moved]
        pass_ = _RowPass(model, plan, ids, self.layout, features, kept)
        hidden = pass_.run()
        if kept is not None and self._kept is not None:
            self._kept[0][:, at], self._kept[1][:, at] = kept
        last = batched.last_hidden(hidden, lengths + hidden.shape[1] - ids.shape[1])
        return pass_.keys, pass_.values, model.language.logits(last)


class _RowPass:
    """One pass over the tokens that are computed in rows of one plan; the others' keys and values are kept."""

    def __init__(
        self,
        model: Alpamayo,
        plan: WindowPlan,
        ids: Tensor,
        layout: PromptLayout,
        features: Tensor,
        kept: tuple[Tensor, Tensor] | None,
    ):
        """Lay out the tokens.

        Args:
            model: The network.
            plan: Of a prompt without navigation text.
            ids: int64 [g, T], with history, navigation text and padding.
            layout: Of the prompt.
            features: [1 + levels, g, image tokens, hidden].
            kept: Keys before rotation and values [layers, g, image tokens, kv_heads, head_dim]; those of images that
                are computed are written.
        """
        self.model, self.plan, self.ids, self.features, self.kept = model, plan, ids, features, kept
        language, length, device = model.language, ids.shape[1], model.device
        images = plan.prompt.images
        # What stands in front of the first image never changes, and is computed again: it is short.
        first = 0 if plan.rows.whole else images[0].start
        tail = images[-1].end
        inner = plan.rows.slots[plan.rows.slots < tail]
        head, end = torch.arange(first, device=device), torch.arange(tail, length, device=device)
        self.slots = torch.cat((head, inner, end))
        self.image_rows = plan.rows.image_rows + first
        self.whole = len(self.slots) == length
        positions = layout.positions(length)
        self.rotation = mrope_cos_sin(positions[:, self.slots], language.config, model.dtype)
        self.image_rotation = mrope_cos_sin(positions[:, plan.image_index], language.config, model.dtype)
        self.mask: Tensor | None = None
        if not self.whole:
            # Padding stands behind all, so that whoever sees the slots in front of its own sees none of it.
            visible = torch.arange(length, device=device)[None] <= self.slots[:, None]
            self.mask = batched.group_masks(visible[None], language.config.group_size, model.dtype)
        #: Per layer [g, kv_heads, T, head_dim].
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def run(self) -> Tensor:
        """Hidden states of the computed tokens behind the final norm, [g, tokens, hidden]."""
        language, rows = self.model.language, self.plan.rows
        embeds, *deepstack = self.features[:, :, rows.image_tokens].unbind()
        x = embedding(self.ids[:, self.slots], language.embed_tokens.weight).index_copy(1, self.image_rows, embeds)
        for i, module in enumerate(language.layers):
            layer = cast(DecoderLayer, module)
            q, k, v = layer.project(x)
            self._keep(i, k, v)
            x = layer.finish(x, self._attend(i, rotate(q, *self.rotation)))
            if i < len(deepstack):
                x = x.index_add(1, self.image_rows, deepstack[i])
        hidden: Tensor = language.norm(x)
        return hidden

    def _keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put a layer's keys before rotation and values [g, tokens, kv_heads, head_dim] beside those that are kept."""
        turned = rotate(k, *self.rotation)
        if self.kept is not None:
            keys, values = (t[layer] for t in self.kept)
            keys.index_copy_(1, self.plan.rows.image_tokens, k[:, self.image_rows])
            values.index_copy_(1, self.plan.rows.image_tokens, v[:, self.image_rows])
            if not self.whole:
                whole_k, whole_v = (t.new_empty(len(t), self.ids.shape[1], *t.shape[2:]) for t in (k, v))
                whole_k[:, self.plan.image_index] = rotate(keys, *self.image_rotation)
                whole_v[:, self.plan.image_index] = values
                whole_k[:, self.slots], whole_v[:, self.slots] = turned, v
                turned, v = whole_k, whole_v
        self.keys.append(turned.transpose(1, 2))
        self.values.append(v.transpose(1, 2))

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        if self.mask is None:
            return batched.attend_causal(q.transpose(1, 2), keys, values)
        return batched.attend_masked(q, keys, values, self.mask)
