"""A stream of windows over one set of weights: what is carried from window to window, and nothing else.

Slots of the cache are those of the prompt, window after window, so positions never grow. When a frame becomes older
its values move to the next older place; its keys are kept before rotation beside the cache, and rotated anew to the
positions of their place: once, whatever the frame has been through, so ageing adds no error in any precision.

All text is computed in every window (labels of cameras and frames, history, navigation), so no text ever speaks of an
older window; only image tokens are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import embedding

from flashdrive_node.engine.slot_pass import run_at_slots
from flashdrive_node.engine.window_plan import Mode, RowPlan, WindowPlan, match_frames, plan_window
from flashdrive_node.model import inference
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.attention import attend, attend_causal, group_mask
from flashdrive_node.model.decoder import Observe
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.inference import Context
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.prompt import MAX_NAV_TOKENS, Prompt
from flashdrive_node.model.rope import mrope_cos_sin, rotate
from flashdrive_node.model.vision import VisionFeatures


@dataclass(frozen=True)
class StreamSettings:
    """What is kept from window to window, and how drift is held back in mode "kv"."""

    mode: Mode = "kv"
    #: Every so many windows all images are computed anew in the language model (not in the vision tower); 0 is never.
    refresh_every: int = 0
    #: In every window one camera's images are computed anew, in turn.
    refresh_views: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(f"mode must be one of {list(get_args(Mode))}, found {self.mode!r}")
        if self.refresh_every < 0:
            raise InputError(f"refresh_every must be 0 (never) or more windows, found {self.refresh_every}")


class Stream:
    """One stream's state: cache, kept features and keys, and the stamps that they belong to.

    Use ``plan``, encode the images it names, then ``prefill``. A failure in between leaves the stream as after
    ``reset``. Buffers are allocated for the first window, and again only for one that needs more room.
    """

    def __init__(self, model: Alpamayo, settings: StreamSettings, room: int):
        """`room` is the number of cache slots behind the prompt, for texts and waypoints."""
        self.model = model
        self.settings = settings
        self.room = room
        self.cache: KVCache | None = None
        #: Windows since the last reset.
        self.windows = 0
        # Per image token: embedding and DeepStack features [1 + levels, tokens, hidden], and keys before rotation
        # [layers, kv_heads, tokens, head_dim].
        self._features: Tensor | None = None
        self._keys: Tensor | None = None
        # Layout and stamps of the last window, or None where nothing may be kept.
        self._images: tuple[object, ...] = ()
        self._stamps: tuple[tuple[int, ...], ...] | None = None

    def reset(self) -> None:
        """Forget all windows; buffers stay."""
        self._stamps = None
        self.windows = 0

    def plan(self, prompt: Prompt, stamps: Sequence[Sequence[int]]) -> WindowPlan:
        """What the next window takes.

        Args:
            prompt: Without history; the same object for windows of the same layout and navigation text.
            stamps: Per camera those of its frames in nanoseconds, ascending.

        Raises:
            InputError: Stamps that are no window of this prompt.
        """
        if [len(s) for s in stamps] != [prompt.frames_per_camera] * len(prompt.camera_indices):
            raise InputError(
                f"stamps of {len(prompt.camera_indices)} camera(s) x {prompt.frames_per_camera} frame(s) are required, "
                f"found {[len(s) for s in stamps]}"
            )
        old = self._stamps if self._images == prompt.images else None
        sources = match_frames(old, stamps)
        s, cameras = self.settings, len(stamps)
        refreshed: tuple[int, ...] = ()
        if s.refresh_every and self.windows % s.refresh_every == 0:
            refreshed = tuple(range(cameras))
        elif s.refresh_views:
            refreshed = (self.windows % cameras,)
        return plan_window(prompt, sources, s.mode, refreshed, self.model.device)

    def prefill(
        self,
        plan: WindowPlan,
        ids: Tensor,
        stamps: Sequence[Sequence[int]],
        features: VisionFeatures | None,
        observe: Observe | None = None,
    ) -> tuple[Context, Tensor]:
        """Bring the stream to the window.

        Args:
            plan: Of `plan`, for this window and since the last.
            ids: The prompt's ids with history filled in, on the model's device, int64 [T].
            stamps: As in `plan`.
            features: Of the images that the plan names, in order; None where it names none.
            observe: See `run_layers`; layer outputs are of the computed tokens, the prompt's last ones at the end.

        Returns:
            The context and the logits of the first generated token, float32 [1, vocabulary].
        """
        self._stamps = None  # nothing may be kept of a window that did not come through
        cache = self._room_for(plan)
        self._move(plan, cache)
        everything = self._take_features(plan, features)

        def keep_keys(name: str, value: Tensor) -> None:
            if self._keys is not None and name.startswith("k_pre_rope."):
                layer = int(name.removeprefix("k_pre_rope."))
                rows, tokens = plan.image_index, slice(0, len(plan.image_index))
                if plan.rows is not None:
                    rows, tokens = plan.rows.image_rows, plan.rows.image_tokens  # type: ignore[assignment]
                self._keys[layer][:, tokens] = value.index_select(0, rows).transpose(0, 1)
            if observe is not None:
                observe(name, value)

        seen = keep_keys if self._keys is not None else observe
        prompt = plan.prompt
        if plan.rows is None:
            context, logits = inference.prefill(
                self.model, ids, plan.positions, prompt.rope_delta, cache, everything, plan.image_index, seen
            )
        else:
            last = run_rows(self.model, plan, plan.rows, ids, cache, everything, seen)
            cache.used = len(ids)
            context, logits = Context(cache, len(ids), prompt.rope_delta), self.model.language.logits(last)
        self._images, self._stamps = prompt.images, tuple(tuple(s) for s in stamps)
        self.windows += 1
        return context, logits

    def _room_for(self, plan: WindowPlan) -> KVCache:
        prompt, tokens = plan.prompt, len(plan.image_index)
        needed = len(prompt.ids) + self.room
        if self.model.config.supports_navigation:  # text may come, go and grow without a larger cache
            nav = prompt.nav_span
            needed += MAX_NAV_TOKENS + 2 - (nav[1] - nav[0] if nav else 0)
        c, device, dtype = self.model.config.text, self.model.device, self.model.dtype
        if self.cache is None or self.cache.slots < needed:
            self.cache = None  # freed before the larger one is allocated
            self.cache = KVCache(c, needed, device, dtype)
        if self.settings.mode != "full" and (self._features is None or self._features.shape[1] < tokens):
            levels = 1 + len(self.model.vision.deepstack_mergers)
            self._features = torch.empty(levels, tokens, c.hidden_size, device=device, dtype=dtype)
        if self.settings.mode == "kv" and (self._keys is None or self._keys.shape[2] < tokens):
            shape = (c.num_layers, c.num_kv_heads, tokens, c.head_dim)
            self._keys = torch.empty(shape, device=device, dtype=dtype)
        return self.cache

    def _move(self, plan: WindowPlan, cache: KVCache) -> None:
        """Put what is kept of frames that became older into its new place."""
        if not len(plan.move_to):
            return
        if self._features is not None:
            self._features[:, plan.move_to] = self._features[:, plan.move_from]
        if self._keys is None:
            return
        keys = self._keys[:, :, plan.move_from]
        self._keys[:, :, plan.move_to] = keys
        source, target = plan.image_index[plan.move_from], plan.image_index[plan.move_to]
        cos, sin = mrope_cos_sin(plan.positions[:, target], self.model.config.text, keys.dtype)
        layers, heads = keys.shape[:2]
        turned = rotate(keys.permute(2, 0, 1, 3).flatten(1, 2), cos, sin)  # all layers at once
        cache.keys[:, :, target] = turned.unflatten(1, (layers, heads)).permute(1, 2, 0, 3)
        cache.values[:, :, target] = cache.values[:, :, source]

    def _take_features(self, plan: WindowPlan, features: VisionFeatures | None) -> VisionFeatures:
        """Features of all images, with the new ones among them."""
        if self._features is None:
            assert features is not None
            return features
        if features is not None:
            for level, new in enumerate((features.embeds, *features.deepstack)):
                self._features[level].index_copy_(0, plan.encode_tokens, new)
        embeds, *deepstack = self._features[:, : len(plan.image_index)].unbind()
        return VisionFeatures(embeds, deepstack)


def run_rows(
    model: Alpamayo,
    plan: WindowPlan,
    rows: RowPlan,
    ids: Tensor,
    cache: KVCache,
    features: VisionFeatures,
    observe: Observe | None = None,
) -> Tensor:
    """Compute some tokens of a prompt, while the cache holds the others.

    Args:
        model: The network.
        plan: The window.
        rows: The tokens.
        ids: Of the whole prompt, int64 [T].
        cache: Slots of the prompt, of which those of `rows` are written.
        features: Of all images.
        observe: As in `run_layers`, of the computed tokens.

    Returns:
        Hidden state of the prompt's last token behind the final norm, [1, hidden].
    """
    language, config = model.language, model.config.text
    x = embedding(ids[rows.slots], language.embed_tokens.weight)
    x = x.index_copy(0, rows.image_rows, features.embeds[rows.image_tokens])
    mask = group_mask(rows.text_mask, config.group_size, x.dtype)
    seen = rows.text_mask.shape[1]

    def attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attended = torch.empty(len(q), config.q_size, device=q.device, dtype=q.dtype)
        for run in rows.runs:
            own = slice(run.first, run.end)
            attended[own] = attend_causal(q[own], keys[:, : run.slots], values[:, : run.slots])
        if seen:
            texts = attend(q[rows.text_rows], keys[:, :seen], values[:, :seen], mask)
            attended.index_copy_(0, rows.text_rows, texts)
        return attended

    def deepstack(layer: int, hidden: Tensor) -> Tensor:
        if layer >= len(features.deepstack):
            return hidden
        return hidden.index_add_(0, rows.image_rows, features.deepstack[layer][rows.image_tokens])

    positions = plan.positions[:, rows.slots]
    x = run_at_slots(language, x, positions, rows.slots, cache, attention, deepstack, observe)
    return language.norm(x[-1:])
