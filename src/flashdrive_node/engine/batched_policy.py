"""The model as a policy for many scenes in lock-step: B windows in, B reasonings and trajectories out.

This is the engines' computation without their node-side bookkeeping: window by window from scratch, or over streams
that keep what the streaming engine keeps. Closed-loop scores, ablations and training drive with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.engine.batched_stream import BatchedStreams, Frames, Stamps
from flashdrive_node.engine.flow_schedule import FlowSchedule, integrate
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.model import batched
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.images import target_size
from flashdrive_node.model.inference import StopRule
from flashdrive_node.model.prompt_batch import PromptLayout
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.model.tokenizer import AlpamayoTokenizer, extract_text

#: Camera indices of the release: front left, front, front right, front telephoto.
RELEASE_CAMERAS = (0, 1, 2, 6)


class Plan(NamedTuple):
    """What the policy wants to do in B windows, with n trajectories each."""

    #: Reasoning per window, or window by window one per sample where each has its own; empty where it has no end.
    texts: list[str]
    #: Acceleration and curvature [B, n, 64, 2], m/s^2 and 1/m.
    actions: Tensor
    #: Positions in the vehicle frame at t0 [B, n, 64, 3], metres, at 0.1 s, 0.2 s, ...
    xyz: Tensor
    #: [B, n, 64], radians and m/s.
    yaw: Tensor
    speed: Tensor
    #: Per text, whether it came to its end; empty where that is not asked for.
    complete: tuple[bool, ...] = ()


class BatchedPolicy:
    """Alpamayo over B windows at once."""

    def __init__(
        self,
        model: Alpamayo,
        tokenizer: AlpamayoTokenizer,
        samples: int = 1,
        temperature: float | None = None,
        flow_steps: int = 10,
        seed: int = 0,
        cameras: Sequence[int] = RELEASE_CAMERAS,
        max_length: int = 64,
        schedule: FlowSchedule | None = None,
        own_texts: bool = False,
    ):
        """Keep a loaded model.

        Args:
            model, tokenizer: Of a checkpoint.
            samples: Trajectories per window.
            temperature: Of the reasoning; None is greedy.
            flow_steps: Integration steps of the trajectory.
            seed: Of the noise, where `plan` is not given a generator.
            cameras: Indices of the cameras, ascending.
            max_length: Longest reasoning, tokens.
            schedule: Which flow steps are evaluated; all of `flow_steps` by default.
            own_texts: Whether each sample has a reasoning of its own, as in the engines; else they share one.
        """
        self.model, self.tokenizer = model, tokenizer
        self.samples, self.cameras, self.own_texts = samples, tuple(cameras), own_texts
        self._table = (schedule or FlowSchedule.uniform(flow_steps)).table(model.device)
        self.sampling = SamplingSettings(temperature=temperature or 0.0, max_length=max_length)
        self.generator = torch.Generator(model.device).manual_seed(seed)
        tokens = model.config.tokens
        self.rule = StopRule(
            stop=tokens.future_start,
            end_of_turn=tokenizer.id("im_end"),
            pad=tokenizer.id("endoftext"),
            forbidden=(tokens.traj_token_start, tokens.traj_vocab_size),
        )
        self._layouts: dict[tuple[int, int, int], PromptLayout] = {}

    @torch.inference_mode()
    def plan(
        self,
        images: Tensor,
        history_xyz: Tensor,
        history_rot: Tensor,
        nav: Sequence[str | None],
        generator: torch.Generator | None = None,
    ) -> Plan:
        """Reason and plan.

        Args:
            images: uint8 [B, cameras, frames, H, W, 3] on the model's device, oldest frame first.
            history_xyz: Ego positions in the vehicle frame at t0, float32 [B, 16, 3], metres.
            history_rot: [B, 16, 3, 3].
            nav: Navigation instruction per window, or None.
            generator: Of the noise, on the model's device; the policy's own by default.

        Raises:
            ModelError: Inputs of a wrong shape, or a navigation text that cannot be used.
        """
        model, generator = self.model, generator or self.generator
        layout = self.layout(images)
        prompts = layout.build(encode_history(history_xyz, history_rot, model.config), nav)
        features = batched.encode_images(model, images)
        positions = layout.positions(prompts.ids.shape[1])
        hidden, keys, values = batched.prefill(model, prompts.ids, positions, features, layout.image_index)
        context = BatchContext(keys, values, prompts.prompt_lengths, layout.rope_delta)
        logits = model.language.logits(batched.last_hidden(hidden, prompts.prompt_lengths))
        return self.answer(context, logits, history_xyz, history_rot, generator)

    @torch.inference_mode()
    def answer(
        self,
        context: BatchContext,
        logits: Tensor,
        history_xyz: Tensor,
        history_rot: Tensor,
        generator: torch.Generator,
        noise: Tensor | None = None,
    ) -> Plan:
        """Reason and plan behind prompts that have been read.

        Args:
            context: The prompts; it is used up.
            logits: Of the first tokens, [B, vocabulary].
            history_xyz, history_rot: As in `plan`.
            generator: Of the texts, and of the noise where none is given.
            noise: Starting points of the flow, float32 [B, samples, waypoints, 2].
        """
        model, rows, texts = self.model, len(logits), self.samples if self.own_texts else 1
        if texts > 1:
            context, logits = _repeated(context, texts), logits.repeat_interleave(texts, dim=0)
        text = batched.decode(model, context, logits, self.sampling, self.rule, generator)
        waypoints = model.config.action_space.n_waypoints
        shape = (rows, self.samples, waypoints, 2)
        if noise is None:
            noise = torch.randn(shape, device=model.device, generator=generator)
        field = batched.velocity_field(model, context, self.samples // texts)
        action = integrate(field, noise.view(rows * texts, -1, waypoints, 2), self._table).action.view(shape)
        space = model.action_space
        speed = space.initial_speed(history_xyz.float(), history_rot.float())
        path = space.to_path(action, speed[:, None].expand(-1, self.samples), history_xyz[:, -1:, 2])
        return Plan(
            [extract_text(self.tokenizer, row)["cot"] for row in text.rows()],
            torch.stack((path.acceleration, path.curvature), dim=-1),
            path.xyz,
            path.yaw,
            path.speed,
            text.stopped,
        )

    def layout(self, images: Tensor) -> PromptLayout:
        """The prompt's layout for images of this shape, see `plan`."""
        frames, height, width = images.shape[2:5]
        return self.layout_of(int(frames), int(height), int(width))

    def layout_of(self, frames: int, height: int, width: int) -> PromptLayout:
        """The prompt's layout for so many frames of each camera, of this size in pixels."""
        key = (frames, height, width)
        if key not in self._layouts:
            config = self.model.config
            factor, patch = config.vision.resize_factor, config.vision.patch_size
            size = target_size(height, width, config.min_pixels, config.max_pixels, factor)
            grid = (size[0] // patch, size[1] // patch)
            self._layouts[key] = PromptLayout(
                self.tokenizer, config, self.cameras, frames, grid, device=self.model.device
            )
        return self._layouts[key]


class StreamingPolicy:
    """Alpamayo over many streams at once: what the streaming engine computes for each of them.

    Speculative decoding is not part of it: at greedy it gives the same texts.
    """

    def __init__(self, policy: BatchedPolicy, settings: StreamSettings):
        """Keep how windows are answered, and what is kept between them."""
        self.policy, self.settings = policy, settings
        self.streams: BatchedStreams | None = None

    def begin(self, lanes: int, frames: int, height: int, width: int) -> None:
        """Begin so many streams anew, of windows with this many frames of each camera, of this size in pixels."""
        layout = self.policy.layout_of(frames, height, width)
        self.streams = None  # freed before the next ones are allocated
        self.streams = BatchedStreams(self.policy.model, layout, lanes, self.settings)

    @torch.inference_mode()
    def plan(
        self,
        lanes: Sequence[int],
        stamps: Sequence[Stamps],
        frames: Frames,
        history_xyz: Tensor,
        history_rot: Tensor,
        nav: Sequence[str | None],
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Plan:
        """The next window of some streams.

        Args:
            lanes, stamps, frames: As in `BatchedStreams.read`.
            history_xyz, history_rot, nav: As in `BatchedPolicy.plan`, on the model's device.
            generator, noise: As in `BatchedPolicy.answer`; the policy's own generator by default.

        Raises:
            InputError: Streams have not begun, or inputs of a wrong shape.
        """
        if self.streams is None:
            raise InputError("streams that have begun are required, found none")
        context, logits = read_windows(self.streams, self.policy, lanes, stamps, frames, history_xyz, history_rot, nav)
        generator = generator or self.policy.generator
        return self.policy.answer(context, logits, history_xyz, history_rot, generator, noise)


def read_windows(
    streams: BatchedStreams,
    policy: BatchedPolicy,
    lanes: Sequence[int],
    stamps: Sequence[Stamps],
    frames: Frames,
    history_xyz: Tensor,
    history_rot: Tensor,
    nav: Sequence[str | None],
) -> tuple[BatchContext, Tensor]:
    """Read prompts into streams, arguments as in `StreamingPolicy.plan`: contexts, and the first tokens' logits."""
    prompts = streams.layout.build(encode_history(history_xyz, history_rot, policy.model.config), nav)
    return streams.read(lanes, stamps, frames, prompts)


def _repeated(context: BatchContext, times: int) -> BatchContext:
    """Every row so many times."""
    keys, values = ([t.repeat_interleave(times, dim=0) for t in ts] for ts in (context.keys, context.values))
    return BatchContext(keys, values, context.lengths.repeat_interleave(times), context.rope_delta)
