"""Windows as a streaming engine meets them: keys and values that come from many windows before, and its own texts.

Several streams go through clips side by side. Each is now and then begun anew, misses frames, and refreshes its images
or never does, so rollouts of every length and kind are among the samples: each window is the end of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.engine.batched_policy import BatchedPolicy, read_windows
from flashdrive_node.engine.batched_stream import BatchedStreams
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.evaluation.clip import Clip, ClipSource, Truth, Window
from flashdrive_node.model import batched
from flashdrive_node.model.action_space import yaw_matrix
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.training.scene_change import SceneWatch
from flashdrive_node.training.text_records import Scenes, TextRecorder, TextRecords, stacked


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
    #: Whether the streams enter their first clips at different windows, so that they are not all of one length.
    staggered: bool = False


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
    #: At t0, m/s, float32 [B].
    speeds: Tensor
    #: The texts, for a drafter; None where not asked for.
    records: TextRecords | None


class Rollouts(Iterator[Samples]):
    """Samples without end where clips are gone through again and again, or one pass."""

    def __init__(
        self,
        policy: BatchedPolicy,
        source: ClipSource,
        settings: RolloutSettings,
        seed: int,
        fresh: bool = False,
        repeat: bool = True,
        recorder: TextRecorder | None = None,
    ):
        """Begin as many streams as there are lanes.

        Args:
            policy: The model, and how it writes.
            source: The clips.
            settings: What happens to streams.
            seed: Of all that is drawn.
            fresh: Whether windows are computed from scratch as well.
            repeat: Begin again behind the last clip.
            recorder: Of the same policy; makes records of the texts.

        Raises:
            InputError: No lane.
        """
        if settings.lanes < 1:
            raise InputError(f"1 lane or more is required, found {settings.lanes}")
        self.policy, self.settings, self.fresh, self.recorder = policy, settings, fresh, recorder
        self._rng = np.random.default_rng(seed)
        self._clips = _clips(source, repeat)
        #: Made with the first window, whose layout all must have.
        self._streams: BatchedStreams | None = None
        self._windows: list[Iterator[Window] | None] = [None] * settings.lanes
        # Of each lane: the number of its clip, and whether its scene has just changed.
        self._clip, self._changed = [-1] * settings.lanes, [False] * settings.lanes
        self._watches = [SceneWatch() for _ in range(settings.lanes)]
        self._begun = 0
        #: Lanes that have had no clip yet.
        self._fresh = set(range(settings.lanes))
        #: Streams to begin anew with their next window, and how they are refreshed from then on, where that changes.
        self._changes: dict[int, StreamSettings | None] = {}

    @torch.no_grad()
    def __next__(self) -> Samples:
        """The next window of every stream.

        Raises:
            StopIteration: Not one stream has a window left.
        """
        found = [item for lane in range(self.settings.lanes) if (item := self._next_window(lane)) is not None]
        if not found:
            raise StopIteration
        policy, windows = self.policy, [window for _, window, _ in found]
        scenes = stacked([window.observation for window in windows], policy.model.device)
        streams = self._streams_for(scenes.images)
        for lane, change in self._changes.items():
            streams.reset(lane, change)
        self._changes.clear()
        lanes, images = [lane for lane, _, _ in found], scenes.images.flatten(1, 2)

        def frames(rows: Sequence[int], chosen: Sequence[int]) -> Tensor:
            return images[torch.tensor(rows)[:, None], torch.tensor(chosen)]

        stamps = [tuple(camera.stamps_ns for camera in window.observation.cameras) for window in windows]
        told = scenes.history_xyz, scenes.history_rot, scenes.navigation
        context, logits = read_windows(streams, policy, lanes, stamps, frames, *told)
        texts = batched.decode(policy.model, context, logits, policy.sampling, policy.rule, policy.generator).rows()
        records: TextRecords | None = None
        if self.recorder is not None:
            layout, device = streams.layout, policy.model.device
            prompts = layout.build(encode_history(*told[:2], policy.model.config), scenes.navigation)
            records = replace(
                self.recorder.told(layout, context, prompts, texts, streams.embeddings(lanes)),
                clips=torch.tensor([self._clip[lane] for lane in lanes], device=device),
                changed=torch.tensor([int(self._changed[lane]) for lane in lanes], device=device),
            )
        return Samples(
            context,
            self._from_scratch(scenes, texts, context.missing) if self.fresh else None,
            self._actions(scenes, [truth for _, _, truth in found]),
            torch.tensor([streams.windows[lane] for lane in lanes], device=policy.model.device),
            policy.model.action_space.initial_speed(scenes.history_xyz, scenes.history_rot),
            records,
        )

    def _streams_for(self, images: Tensor) -> BatchedStreams:
        """Streams of windows with such images.

        Raises:
            InputError: They are of another layout than the first ones.
        """
        layout = self.policy.layout(images)
        if self._streams is None:
            self._streams = BatchedStreams(self.policy.model, layout, self.settings.lanes, StreamSettings("kv"))
        if self._streams.layout is not layout:
            raise InputError(f"pictures of one size in all clips are required, found others: {list(images.shape[2:5])}")
        return self._streams

    def _next_window(self, lane: int) -> tuple[int, Window, Truth] | None:
        """The next window of a stream that is neither missed nor without truth."""
        s, rng = self.settings, self._rng
        while True:
            windows = self._windows[lane]
            if windows is None:
                clip = next(self._clips, None)
                if clip is None:
                    return None
                # Of several clips at a time, each is read whole: a source goes through them one by one.
                windows = self._windows[lane] = clip.windows if s.lanes == 1 else self._taken(lane, clip)
                every, views = int(rng.choice(s.refresh_every)), bool(rng.random() < s.refresh_views)
                self._changes[lane] = StreamSettings("kv", every, views)
                self._clip[lane], self._begun = self._begun, self._begun + 1
                self._watches[lane].begin()
            window = next(windows, None)
            if window is None:
                self._windows[lane] = None
                continue
            sentence = None if window.truth is None else window.truth.sentence
            self._changed[lane] = self._watches[lane].see(sentence)
            if window.truth is None or rng.random() < s.drop:
                continue
            if rng.random() < s.reset:
                self._changes.setdefault(lane, None)
            return lane, window, window.truth

    def _taken(self, lane: int, clip: Clip) -> Iterator[Window]:
        windows = list(clip.windows)
        entered = len(windows) * lane // self.settings.lanes if self.settings.staggered and lane in self._fresh else 0
        self._fresh.discard(lane)
        return iter(windows[entered:])

    def _from_scratch(self, scenes: Scenes, texts: list[list[int]], missing: Tensor | int) -> BatchContext:
        """Contexts of the plain engine, with given texts, some of whose last tokens were not run."""
        policy = self.policy
        layout = policy.layout(scenes.images)
        history = encode_history(scenes.history_xyz, scenes.history_rot, policy.model.config)
        told = layout.build(history, scenes.navigation, texts)
        features = batched.encode_images(policy.model, scenes.images)
        positions = layout.positions(told.ids.shape[1])
        _, keys, values = batched.prefill(policy.model, told.ids, positions, features, layout.image_index)
        return BatchContext(keys, values, told.lengths, layout.rope_delta, missing)

    def _actions(self, scenes: Scenes, truths: list[Truth]) -> Tensor:
        """What was driven, as normalised actions, float32 [B, 64, 2]."""
        model = self.policy.model
        future = torch.from_numpy(np.stack([truth.xyz for truth in truths]))
        turned = yaw_matrix(torch.from_numpy(np.stack([truth.yaw for truth in truths])))
        driven = (t.to(model.device) for t in (future, turned))
        return model.action_space.to_action(scenes.history_xyz, scenes.history_rot, *driven)


def _clips(source: ClipSource, repeat: bool) -> Iterator[Clip]:
    while True:
        count = 0
        for clip in source.clips():
            count += 1
            yield clip
        if not repeat or not count:
            return
