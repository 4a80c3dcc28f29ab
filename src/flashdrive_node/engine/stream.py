"""A stream of windows over one set of weights: what is carried from window to window, and nothing else.

Slots of the cache are those of the prompt, window after window, so positions never grow. When a frame becomes older
its values move to the next older place; its keys are kept before rotation beside the cache, and rotated anew to the
positions of their place: once, whatever the frame has been through, so ageing adds no error in any precision.

All text is computed in every window (labels of cameras and frames, history, navigation), so no text ever speaks of an
older window; only image tokens are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from flashdrive_node.engine.graphs import Graphs
from flashdrive_node.engine.kernels.ageing import age
from flashdrive_node.engine.kernels.rotary import KeptKeys
from flashdrive_node.engine.row_pass import run_rows
from flashdrive_node.engine.slot_pass import next_logits
from flashdrive_node.engine.taps import Tapped, Taps
from flashdrive_node.engine.window_plan import Mode, WindowPlan, match_frames, plan_window
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.inference import Context
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.prompt import MAX_NAV_TOKENS, Prompt
from flashdrive_node.model.rope import mrope_cos_sin
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

    def refreshed(self, windows: int, cameras: int) -> tuple[int, ...]:
        """Cameras, by their place, whose kept images are computed anew behind so many windows."""
        if self.refresh_every and windows % self.refresh_every == 0:
            return tuple(range(cameras))
        return (windows % cameras,) if self.refresh_views else ()


class Stream:
    """One stream's state: cache, kept features and keys, and the stamps that they belong to.

    Use ``plan``, encode the images it names, then ``prefill``. A failure in between leaves the stream as after
    ``reset``. Buffers are allocated for the first window, and again only for one that needs more room.
    """

    def __init__(
        self,
        model: Alpamayo,
        settings: StreamSettings,
        room: int,
        graphs: Graphs | None = None,
        tapped: Tapped | None = None,
    ):
        """Make a stream that has seen nothing.

        Args:
            model: The network; streams share it.
            settings: What is kept.
            room: Cache slots behind the prompt, for texts and waypoints.
            graphs: Of this stream alone; by default nothing is captured.
            tapped: What is kept of the prompt's last tokens for a drafter.
        """
        self.model = model
        self.settings = settings
        self.room = room
        self.graphs = graphs or Graphs(model.device, enabled=False)
        self.tapped = tapped or Tapped((), 1)
        self.cache: KVCache | None = None
        #: Windows since the last reset.
        self.windows = 0
        # Per image token: embedding and DeepStack features [1 + levels, tokens, hidden], and keys before rotation
        # [layers, kv_heads, tokens, head_dim].
        self._features: Tensor | None = None
        self._keys: Tensor | None = None
        # Where a prefill finds its input and leaves its output: ids [slots], logits [1, vocabulary].
        self._ids: Tensor | None = None
        self._logits: Tensor | None = None
        #: Of `tapped`, for the last window, aligned at the prompt's end: [tokens, layers * hidden].
        self.states: Tensor | None = None
        # By structure: a plan whose tensors stay in place, and the plan that they were last filled from.
        self._placed: OrderedDict[Hashable, tuple[WindowPlan, WindowPlan]] = OrderedDict()
        # Layout and stamps of the last window, or None where nothing may be kept.
        self._prompt: Prompt | None = None
        self._stamps: tuple[tuple[int, ...], ...] | None = None
        # The plan that frames have been aged for.
        self._aged: WindowPlan | None = None
        # Leading cameras that have been brought to the coming window already.
        self._ahead = 0

    def reset(self) -> None:
        """Forget all windows; buffers stay."""
        self._stamps = self._aged = None
        self._ahead = self.windows = 0

    @torch.inference_mode()
    def blank(self) -> None:
        """Zero the keys and values that are kept, as an evaluation does that must notice it."""
        kept = [self._keys] if self.cache is None else [self._keys, self.cache.keys, self.cache.values]
        for tensor in kept:
            if tensor is not None:
                tensor.zero_()

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
        old = self._stamps if self._prompt is not None and self._prompt.images == prompt.images else None
        sources = match_frames(old, stamps)
        done = 0
        while old is not None and done < self._ahead and old[done] == tuple(stamps[done]):
            done += 1
        # The newest frames of the others that came ahead were computed beside frames of a window that it is not.
        newest = prompt.frames_per_camera - 1
        sources = tuple(
            tuple(None if done <= i < self._ahead and source == newest else source for source in camera)
            for i, camera in enumerate(sources)
        )
        refreshed = self.settings.refreshed(self.windows, len(stamps))
        span = (min((done, *refreshed)), None)
        return plan_window(prompt, sources, self.settings.mode, refreshed, self.model.device, span)

    def embeddings(self, tokens: int) -> Tensor:
        """Embeddings of the last window's first image tokens, [tokens, hidden], in the same tensor as ever."""
        assert self._features is not None
        return self._features[0, :tokens]

    @property
    def next_camera(self) -> int | None:
        """Index of the camera that `advance` would take, or None before the first window."""
        if self._stamps is None or self._prompt is None or self._ahead == len(self._stamps):
            return None
        return self._prompt.camera_indices[self._ahead]

    def advance(self, camera_index: int, stamp_ns: int, features: VisionFeatures) -> bool:
        """Bring one camera to the coming window, while the others' frames are still to come.

        A camera sees those in front of it, so cameras come in their order; the last is left to `prefill`, which has the
        window's text to compute anyway. What is computed here is what `prefill` would compute.

        Args:
            camera_index: The `next_camera`.
            stamp_ns: Of the frame that it will have as its newest.
            features: Of that frame.

        Returns:
            False where nothing was done, because the frame is no newer one or of another size, the camera is the last,
            or the mode keeps no keys and values.
        """
        stamps, prompt, camera = self._stamps, self._prompt, self._ahead
        if stamps is None or prompt is None or camera_index != self.next_camera:
            raise ValueError(f"camera {self.next_camera} is required, found {camera_index}")
        if self.settings.mode != "kv" or camera + 1 == len(stamps) or stamp_ns <= stamps[camera][-1]:
            return False
        if len(features.embeds) != prompt.images[camera * prompt.frames_per_camera].count:
            return False  # a picture of another size starts the stream anew, with its window
        still: tuple[int | None, ...] = tuple(range(prompt.frames_per_camera))
        sources = tuple((*still[1:], None) if i == camera else still for i in range(len(stamps)))
        plan = plan_window(prompt, sources, "kv", (), self.model.device, (camera, camera + 1))
        self._stamps = None
        self._run(plan, features)
        self._stamps = (*stamps[:camera], (*stamps[camera][1:], stamp_ns), *stamps[camera + 1 :])
        self._ahead = camera + 1
        return True

    def age(self, plan: WindowPlan) -> None:
        """Make room for a window's new frames, ahead of `prefill`: nothing of it waits for them.

        Args:
            plan: Of `plan`, for the window that `prefill` comes with next.
        """
        self._stamps = None
        self._room_for(plan)
        if len(plan.moves.target):
            placed = self._place(plan)
            self.graphs.run((self, "age", placed), lambda: self._age(placed))
        self._aged = plan

    def prefill(
        self,
        plan: WindowPlan,
        ids: Tensor,
        stamps: Sequence[Sequence[int]],
        features: VisionFeatures | None,
    ) -> tuple[Context, Tensor]:
        """Bring the stream to the window.

        Args:
            plan: Of `plan`, for this window and since the last.
            ids: The prompt's ids with history filled in, int64 [T], on the host or the model's device.
            stamps: As in `plan`.
            features: Of the images that the plan names, in order; None where it names none.

        Returns:
            The context, and the logits of the first generated token, [1, vocabulary] in the model's type, in the same
            tensor as ever.
        """
        self._stamps = None  # nothing may be kept of a window that did not come through
        self._ahead = 0
        cache = self._room_for(plan)
        assert self._ids is not None
        assert self._logits is not None
        self._ids[: len(ids)].copy_(ids, non_blocking=True)
        self._run(plan, features)
        cache.used = len(ids)
        self._prompt, self._stamps = plan.prompt, tuple(tuple(s) for s in stamps)
        self.windows += 1
        return Context(cache, len(ids), plan.prompt.rope_delta), self._logits

    def _run(self, plan: WindowPlan, features: VisionFeatures | None) -> None:
        """Carry a plan out."""
        if self._aged is not plan:
            self.age(plan)
        self._aged = None
        self._take_features(plan, features)
        placed = self._place(plan)
        self.graphs.run((self, "rows", placed), lambda: self._compute(placed))

    def _place(self, plan: WindowPlan) -> WindowPlan:
        """The plan in tensors that are the same ones for all plans of its structure, as a graph needs it."""
        if not self.graphs.enabled:
            return plan
        structure = plan.structure
        if structure not in self._placed:
            self._placed[structure] = plan.clone(), plan
            if len(self._placed) > self.graphs.limit:  # a graph of it goes on having its own
                self._placed.popitem(last=False)
        self._placed.move_to_end(structure)
        placed, filled_from = self._placed[structure]
        if filled_from is not plan:
            for target, source in zip(placed.tensors, plan.tensors, strict=True):
                target.copy_(source)
            self._placed[structure] = placed, plan
        return placed

    def _compute(self, plan: WindowPlan) -> None:
        """Run the plan's tokens."""
        cache, keys, rows = self.cache, self._keys, plan.rows
        assert cache is not None
        assert self._ids is not None
        assert self._features is not None
        assert self._logits is not None
        taps = Taps(*self.tapped)
        embeds, *deepstack = self._features[:, : len(plan.image_index)].unbind()
        last = run_rows(
            self.model,
            plan,
            self._ids[: plan.positions.shape[1]],
            cache,
            VisionFeatures(embeds, deepstack),
            None if keys is None else lambda layer: KeptKeys(keys[layer], rows.places),
            taps,
        )
        if rows.last:
            self._logits.copy_(next_logits(self.model.language, last))
            if self.states is not None:
                states = taps.states()
                self.states[-len(states) :].copy_(states)

    def _room_for(self, plan: WindowPlan) -> KVCache:
        prompt, tokens = plan.prompt, len(plan.image_index)
        needed = len(prompt.ids) + self.room
        if self.model.config.supports_navigation:  # text may come, go and grow without a larger cache
            nav = prompt.nav_span
            needed += MAX_NAV_TOKENS + 2 - (nav[1] - nav[0] if nav else 0)
        if (
            self.cache is None
            or self.cache.slots < needed
            or self._features is None
            or self._features.shape[1] < tokens
        ):
            self._allocate(needed, tokens)
        assert self.cache is not None
        return self.cache

    def _allocate(self, slots: int, tokens: int) -> None:
        """Buffers for so many cache slots and image tokens, and none smaller than they were."""
        c, device, dtype = self.model.config.text, self.model.device, self.model.dtype
        if self.cache is not None and self._features is not None:
            slots, tokens = max(slots, self.cache.slots), max(tokens, self._features.shape[1])
        self.graphs.clear()
        self._placed.clear()
        self.cache = self._features = self._keys = None  # freed before the larger ones are allocated
        self.cache = KVCache(c, slots, device, dtype)
        levels = 1 + len(self.model.vision.deepstack_mergers)
        self._features = torch.empty(levels, tokens, c.hidden_size, device=device, dtype=dtype)
        if self.settings.mode == "kv":
            # One place more, for rows that hold no image token.
            shape = (c.num_layers, c.num_kv_heads, tokens + 1, c.head_dim)
            self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._ids = torch.zeros(slots, dtype=torch.int64, device=device)
        self._logits = torch.empty(1, self.model.config.tokens.vocab_size, device=device, dtype=dtype)
        if self.tapped.layer_ids:
            width = len(self.tapped.layer_ids) * c.hidden_size
            # Finite where a prompt is shorter.
            self.states = torch.zeros(self.tapped.last, width, device=device, dtype=dtype)

    def _age(self, plan: WindowPlan) -> None:
        """Put what is kept of frames that became older into its new place."""
        cache, features, moves = self.cache, self._features, plan.moves
        assert cache is not None
        assert features is not None
        features[:, moves.target] = features[:, moves.source]
        if self._keys is not None:
            config = self.model.config.text
            target = plan.positions[:, plan.image_index[moves.target]]
            rotation = mrope_cos_sin(target, config, self._keys.dtype)
            age(self._keys, cache.keys, cache.values, plan.image_index, moves, rotation)

    def _take_features(self, plan: WindowPlan, features: VisionFeatures | None) -> None:
        """Put the features of new images among those that are kept."""
        assert self._features is not None
        if features is not None:
            for level, new in enumerate((features.embeds, *features.deepstack)):
                self._features[level].index_copy_(0, plan.encode_tokens, new)
