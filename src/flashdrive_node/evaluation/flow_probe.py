"""Windows up to the point where their flow starts, for trying several ways to integrate it from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.engine.flow_schedule import FlowSchedule, integrate
from flashdrive_node.engine.observations import ego_history
from flashdrive_node.engine.protocol import Observation
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model import inference
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.flow_matching import Velocity
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.images import preprocess
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.prompt import driving_prompt, fuse_history
from flashdrive_node.model.sampling import SamplingSettings


@dataclass(frozen=True, eq=False)
class WindowFlow:
    """The flow of one window: text and context stand, nothing is integrated yet.

    Valid until the next window is probed.
    """

    model: Alpamayo
    velocity: Velocity
    #: Float32 [samples, waypoints, 2].
    noise: Tensor
    #: At t0, m/s.
    speed: float

    @torch.inference_mode()
    def path(self, schedule: FlowSchedule) -> Tensor:
        """Where the samples go under a schedule: float32 [samples, waypoints, 3] on the host, metres."""
        action = integrate(self.velocity, self.noise, schedule.table(self.noise.device)).action
        speed = torch.full(action.shape[:1], self.speed, device=action.device)
        return self.model.action_space.to_path(action, speed).xyz.float().cpu()

    @torch.inference_mode()
    def velocities(self, steps: int) -> Tensor:
        """Velocities at every one of so many equal steps: float32 [samples, steps, waypoints, 2] on the host."""
        met: list[Tensor] = []

        def recorded(x: Tensor, t: Tensor) -> Tensor:
            met.append(self.velocity(x, t))
            return met[-1]

        integrate(recorded, self.noise, FlowSchedule.uniform(steps).table(self.noise.device))
        return torch.stack(met, dim=1).float().cpu()


class FlowProbe:
    """Runs windows, each on its own and with its own random numbers, as far as their flow."""

    def __init__(self, loaded: LoadedModel, samples: int, sampling: SamplingSettings):
        """`samples` rows per window, each with a text of its own drawn by `sampling`."""
        self.loaded, self.samples, self.sampling = loaded, samples, sampling

    @torch.inference_mode()
    def window(self, observation: Observation, seed: int) -> WindowFlow:
        """Read a window, and generate its texts.

        Args:
            observation: The window.
            seed: Of texts and noise.

        Raises:
            ModelError: The window cannot be used.
        """
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        config, device, cameras = model.config, model.device, observation.cameras
        generator = torch.Generator(device).manual_seed(seed)
        pixels, grids = preprocess([c.images for c in cameras], config, device, model.dtype)
        indices = [camera.camera_index for camera in cameras]
        prompt = driving_prompt(tokenizer, config, indices, len(cameras[0].images), grids, observation.nav_text)
        history_xyz, history_rot = ego_history(observation)
        prompt = fuse_history(prompt, encode_history(history_xyz, history_rot, config))
        cache = inference.new_cache(model, len(prompt.ids), self.samples, self.sampling.max_length)
        context, logits = inference.prefill(
            model,
            prompt.ids.to(device),
            prompt.positions.to(device),
            prompt.rope_delta,
            cache,
            model.vision(pixels, grids),
            prompt.image_index.to(device),
        )
        tokens = config.tokens
        rule = inference.StopRule(
            stop=tokens.future_start,
            end_of_turn=tokenizer.id("im_end"),
            pad=tokenizer.id("endoftext"),
            forbidden=(tokens.traj_token_start, tokens.traj_vocab_size),
        )
        text = inference.decode(model, context, logits, self.samples, self.sampling, rule, generator)
        velocity = inference.velocity_field(model, context, text)
        noise = inference.draw_noise(model, self.samples, 1.0, generator)
        return WindowFlow(model, velocity, noise, float(model.action_space.initial_speed(history_xyz, history_rot)))


def relative_change(velocities: Tensor) -> Tensor:
    """How much the velocity changes from each step to the next, relative to its size over the whole flow.

    Args:
        velocities: [recordings, steps, ...].

    Returns:
        float64 [recordings, steps - 1].
    """
    v = velocities.double().flatten(2)
    size = v.square().mean(dim=(1, 2)).sqrt()[:, None]
    return (v[:, 1:] - v[:, :-1]).square().mean(dim=2).sqrt() / size


def flow_change(loaded: LoadedModel, settings: PlainSettings) -> Callable[[Observation, int], list[float]]:
    """What tells of an observation and a seed how much the flow's velocity changes from step to step.

    Args:
        loaded: The model.
        settings: Of the sampling, and the number of flow steps.
    """
    probe = FlowProbe(loaded, 1, settings.sampling)
    steps = settings.flow_steps or loaded.model.config.flow.num_inference_steps

    def change(observation: Observation, seed: int) -> list[float]:
        found: list[float] = relative_change(probe.window(observation, seed).velocities(steps))[0].tolist()
        return [round(value, 5) for value in found]

    return change
