"""Windows as a streaming engine meets them: keys and values that come from many windows before, and its own texts.

Several streams go through clips side by side. Each is now and then begun anew, misses frames, and refreshes its images
or never does, so rollouts of every length and kind are among the samples: each window is the end of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.stage_timer import StageTimer
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.clip import Clip, ClipSource, Truth, Window
from flashdrive_node.model import batched
from flashdrive_node.model.action_space import yaw_matrix
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.inference import Context
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.training.text_records import stacked


@dataclass(frozen=True)
class RolloutSettings:
    """What happens to streams on the way."""

    #: Streams side by side, which is the number of samples that come at a time.
    lanes: int = 32
    #: Chance per window that a stream begins anew, and that a window is missed, so that the next has more new frames.
    reset: float = 1 / 60
    drop: float = 0.1
    #: Choices of `StreamSettings.refresh_every`, drawn per clip, and share of clips with `refresh_views`.
    refresh_every: tuple[int, ...] = (0, 0, 0, 0, 10, 30)
    refresh_views: float = 0.1


class Samples(NamedTuple):
    """The ends of B rollouts, on the model's device."""

    #: What the expert sees: the stream's keys and values with the text behind them.
    context: BatchContext
    #: The same windows computed from scratch, with the same texts; None where not asked for.
    fresh: BatchContext | None
    #: What was driven, normalised, float32 [B, 64, 2].
    actions: Tensor
    #: Windows since the stream began, this one included, int64 [B].
    lengths: Tensor


class _Lane(StreamingEngine):
    """A stream that reads windows and leaves the rest to batches."""

    def read(self, window: Window) -> tuple[Context, Tensor]:
        """Bring the stream to a window: the context, and the logits of the first token."""
        _, context, logits = self._read(window.observation, StageTimer(self._model().device))
        return context, logits


class Rollouts(Iterator[Samples]):
    """Samples without end where clips are gone through again and again, or one pass."""

    def __init__(
        self,
        loaded: LoadedModel,
        policy: BatchedPolicy,
        source: ClipSource,
        settings: RolloutSettings,
        seed: int,
        fresh: bool = False,
        repeat: bool = True,
    ):
        """Begin as many streams as there are lanes.

        Args:
            loaded: The model.
            policy: How it writes; its model is the same.
            source: The clips.
            settings: What happens to streams.
            seed: Of all that is drawn.
            fresh: Whether windows are computed from scratch as well.
            repeat: Begin again behind the last clip.

        Raises:
            InputError: No lane.
        """
        if settings.lanes < 1:
            raise InputError(f"1 lane or more is required, found {settings.lanes}")
        self.policy, self.settings, self.fresh = policy, settings, fresh
        self._rng = np.random.default_rng(seed)
        self._clips = _clips(source, repeat)
        base = StreamingSettings(
            checkpoint="", device=str(loaded.model.device), precision="auto", samples=1, sampling=policy.sampling,
            stream=StreamSettings("kv"), graphs=False,
        )  # fmt: skip
        self._lanes = [_Lane(base, loaded) for _ in range(settings.lanes)]
        self._windows: list[Iterator[Window] | None] = [None] * settings.lanes

    @torch.no_grad()
    def __next__(self) -> Samples:
        """The next window of every stream.

        Raises:
            StopIteration: Not one stream has a window left.
        """
        found = [item for lane in range(len(self._lanes)) if (item := self._next_window(lane)) is not None]
        if not found:
            raise StopIteration
        lanes = [self._lanes[lane] for lane, _, _ in found]
        read = [engine.read(window) for engine, (_, window, _) in zip(lanes, found, strict=True)]
        contexts = [context for context, _ in read]
        device = self.policy.model.device
        longest = max(context.prefix for context in contexts)

        def joined(name: str) -> list[Tensor]:
            """[B, kv_heads, slots, head_dim] per layer; copies, because the streams go on."""
            whole = [getattr(c.cache, name)[:, :, : c.prefix] for c in contexts]
            padded = torch.stack([pad(t, (0, 0, 0, longest - t.shape[2])) for t in whole], dim=1)
            return list(padded.unbind())

        prefixes = torch.tensor([context.prefix for context in contexts], device=device)
        context = BatchContext(joined("keys"), joined("values"), prefixes, contexts[0].rope_delta)
        logits = torch.cat([first for _, first in read])
        policy = self.policy
        texts = batched.decode(policy.model, context, logits, policy.sampling, policy.rule, policy.generator).rows()
        observations = [window for _, window, _ in found]
        return Samples(
            context,
            self._from_scratch(observations, texts, context.missing) if self.fresh else None,
            self._actions(observations, [truth for _, _, truth in found]),
            torch.tensor([engine.stream.windows for engine in lanes if engine.stream is not None], device=device),
        )

    def _next_window(self, lane: int) -> tuple[int, Window, Truth] | None:
        """The next window of a stream that is neither missed nor without truth."""
        engine, s, rng = self._lanes[lane], self.settings, self._rng
        while True:
            windows = self._windows[lane]
            if windows is None:
                clip = next(self._clips, None)
                if clip is None:
                    return None
                # Of several clips at a time, each is read whole: a source goes through them one by one.
                windows = self._windows[lane] = clip.windows if s.lanes == 1 else iter(list(clip.windows))
                every, views = int(rng.choice(s.refresh_every)), bool(rng.random() < s.refresh_views)
                engine.reset("clip")
                if engine.stream is not None:
                    engine.stream.settings = replace(engine.stream.settings, refresh_every=every, refresh_views=views)
            window = next(windows, None)
            if window is None:
                self._windows[lane] = None
                continue
            if window.truth is None or rng.random() < s.drop:
                continue
            if rng.random() < s.reset:
                engine.reset("rollout")
            return lane, window, window.truth

    def _from_scratch(self, windows: list[Window], texts: list[list[int]], missing: Tensor | int) -> BatchContext:
        """Contexts of the plain engine, with given texts, some of whose last tokens were not run."""
        policy = self.policy
        scenes = stacked([window.observation for window in windows], policy.model.device)
        layout = policy.layout(scenes.images)
        history = encode_history(scenes.history_xyz, scenes.history_rot, policy.model.config)
        told = layout.build(history, scenes.navigation, texts)
        features = batched.encode_images(policy.model, scenes.images)
        positions = layout.positions(told.ids.shape[1])
        _, keys, values = batched.prefill(policy.model, told.ids, positions, features, layout.image_index)
        return BatchContext(keys, values, told.lengths, layout.rope_delta, missing)

    def _actions(self, windows: list[Window], truths: list[Truth]) -> Tensor:
        """What was driven, as normalised actions, float32 [B, 64, 2]."""
        model = self.policy.model
        observations = [window.observation for window in windows]
        xyz = torch.from_numpy(np.stack([o.ego_history_xyz for o in observations]))
        rot = torch.from_numpy(np.stack([o.ego_history_rot for o in observations]))
        future = torch.from_numpy(np.stack([truth.xyz for truth in truths]))
        turned = yaw_matrix(torch.from_numpy(np.stack([truth.yaw for truth in truths])))
        inputs = (t.to(model.device) for t in (xyz, rot, future, turned))
        return model.action_space.to_action(*inputs)


def _clips(source: ClipSource, repeat: bool) -> Iterator[Clip]:
    while True:
        count = 0
        for clip in source.clips():
            count += 1
            yield clip
        if not repeat or not count:
            return
