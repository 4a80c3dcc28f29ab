"""The model as a policy for many scenes in lock-step: B windows in, B reasonings and trajectories out.

This is the plain engine's computation without its node-side bookkeeping; closed-loop scores and training in closed
loop drive with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.model import batched
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.batched import BatchContext
from flashdrive_node.model.flow_matching import integrate
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

    #: Reasoning per window; empty where it has no end.
    texts: list[str]
    #: Acceleration and curvature [B, n, 64, 2], m/s^2 and 1/m.
    actions: Tensor
    #: Positions in the vehicle frame at t0 [B, n, 64, 3], metres, at 0.1 s, 0.2 s, ...
    xyz: Tensor
    #: [B, n, 64], radians and m/s.
    yaw: Tensor
    speed: Tensor


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
    ):
        """Keep a loaded model.

        Args:
            model, tokenizer: Of a checkpoint.
            samples: Trajectories per window, which share one reasoning.
            temperature: Of the reasoning; None is greedy.
            flow_steps: Integration steps of the trajectory.
            seed: Of the noise, where `plan` is not given a generator.
            cameras: Indices of the cameras, ascending.
            max_length: Longest reasoning, tokens.
        """
        self.model, self.tokenizer = model, tokenizer
        self.samples, self.flow_steps, self.cameras = samples, flow_steps, tuple(cameras)
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
        text = batched.decode(model, context, logits, self.sampling, self.rule, generator)

        waypoints = model.config.action_space.n_waypoints
        shape = (images.shape[0], self.samples, waypoints, 2)
        noise = torch.randn(shape, device=model.device, generator=generator)
        action = integrate(batched.velocity_field(model, context, self.samples), noise, self.flow_steps)
        space = model.action_space
        speed = space.initial_speed(history_xyz.float(), history_rot.float())
        path = space.to_path(action, speed[:, None].expand(-1, self.samples), history_xyz[:, -1:, 2])
        return Plan(
            [extract_text(self.tokenizer, row)["cot"] for row in text.rows()],
            torch.stack((path.acceleration, path.curvature), dim=-1),
            path.xyz,
            path.yaw,
            path.speed,
        )

    def layout(self, images: Tensor) -> PromptLayout:
        """The prompt's layout for images of this shape, see `plan`."""
        frames, height, width = images.shape[2:5]
        key = (int(frames), int(height), int(width))
        if key not in self._layouts:
            config = self.model.config
            factor, patch = config.vision.resize_factor, config.vision.patch_size
            size = target_size(key[1], key[2], config.min_pixels, config.max_pixels, factor)
            grid = (size[0] // patch, size[1] // patch)
            self._layouts[key] = PromptLayout(
                self.tokenizer, config, self.cameras, key[0], grid, device=self.model.device
            )
        return self._layouts[key]
