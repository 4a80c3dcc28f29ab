"""The plain engine: every window from scratch, one token at a time, every flow step evaluated.

This is the model's own computation with nothing approximated: the baseline that faster engines are compared with.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from flashdrive_node.engine.observations import camera_layout, ego_history, grey_window
from flashdrive_node.engine.precision import automatic
from flashdrive_node.engine.prediction import Departure, Reasoning, Spoken, medoid, spoken, trajectory_samples
from flashdrive_node.engine.protocol import (
    EngineError,
    EngineInfo,
    Observation,
    Prediction,
    Progress,
)
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.engine.stage_timer import StageTimer
from flashdrive_node.model import inference
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.errors import ModelError
from flashdrive_node.model.flow_matching import Velocity
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.images import preprocess
from flashdrive_node.model.inference import Context, Generated, StopRule
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.model.precision import StagePrecision
from flashdrive_node.model.prompt import Prompt, driving_prompt, fuse_history, question_prompt, without_navigation
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.model.source import resolve_source
from flashdrive_node.model.tokenizer import extract_text

logger = logging.getLogger(__name__)


class PlainEngine:
    """Engine protocol over the plain inference stages."""

    #: Windows after which every stage has run.
    warm_up_windows = 1

    def __init__(self, settings: PlainSettings, loaded: LoadedModel | None = None):
        """`loaded` is a model to use in place of the settings' checkpoint."""
        self.settings = settings
        self.loaded = loaded
        self.cache: KVCache | None = None
        self.windows = 0
        #: Tokens to take in place of the drawn ones, [samples, steps]: benchmarks fix the text's length with it.
        self.script: Tensor | None = None
        self._precision_reason = ""
        self._layout: tuple[Prompt, Tensor, Tensor] | None = None

    def load(self, progress: Progress | None = None) -> EngineInfo:
        """Read the checkpoint onto the device."""
        s = self.settings
        try:
            if s.torch_device.index is not None and s.torch_device.type == "cuda":
                torch.cuda.set_device(s.torch_device)  # kernels, streams and events are the current device's
            if self.loaded is None:
                stages = s.stages
                if s.precision == "auto":
                    directory = resolve_source(s.checkpoint, s.revision, s.allow_download)
                    stages, self._precision_reason = automatic(directory, s.torch_device, s.samples, s.allow_download)
                    logger.info("precision auto: %s", self._precision_reason)
                self.loaded = load_alpamayo(
                    s.checkpoint,
                    s.torch_device,
                    s.dtype,
                    revision=s.revision,
                    allow_download=s.allow_download,
                    overlay=s.overlay,
                    precision=stages,
                    progress=progress,
                )
        except (ModelError, OSError, RuntimeError) as error:
            raise EngineError(f"checkpoint {s.checkpoint} cannot be loaded: {error}") from error
        config, info = self.loaded.model.config, self.loaded.info
        return EngineInfo(
            name=f"plain {config.model_type}",
            checkpoint=f"{info.path}" + (f" at {info.revision}" if info.revision else ""),
            sha256=info.sha256,
            device=str(self.loaded.model.device),
            precision=_precision_name(self.loaded),
            history_poses=config.history_poses,
            waypoints=config.action_space.n_waypoints,
            waypoint_dt_s=config.action_space.dt,
            precision_reason=self._precision_reason,
        )

    def warm_up(self, progress: Progress | None = None) -> None:
        """Grey windows at walking pace through every stage."""
        for window in range(self.warm_up_windows):
            if progress:
                progress(window / self.warm_up_windows, "warming up")
            self._rehearse(window)
        self.reset("warm-up")
        if progress:
            progress(1.0, "warm")

    def _rehearse(self, window: int) -> None:
        """Run one window of the warm-up."""
        self.step(self._grey_window(window))

    def _grey_window(self, window: int) -> Observation:
        return grey_window(self.settings, self._model().config, window)

    @torch.inference_mode()
    def step(self, observation: Observation) -> Prediction:
        """Answer one observation, independent of earlier ones."""
        try:
            return self._step(observation)
        except ModelError as error:
            raise EngineError(f"window {observation.window_id}: {error}") from error

    @torch.inference_mode()
    def answer(self, observation: Observation, question: str, sampling: SamplingSettings | None = None) -> str:
        """Answer a question about the images of an observation (Alpamayo 1.5); the ego history is not looked at.

        Args:
            observation: Gives the images.
            question: Untrusted text.
            sampling: How tokens are drawn; by default as the reference does, up to 256 of them.

        Raises:
            EngineError: The question or the images cannot be used.
        """
        model = self._model()
        assert self.loaded is not None
        tokenizer = self.loaded.tokenizer
        sampling = sampling or SamplingSettings(max_length=256)
        try:
            pixels, grids = preprocess([c.images for c in observation.cameras], model.config, model.device, model.dtype)
            indices, frames = camera_layout(observation)
            prompt = question_prompt(tokenizer, model.config, indices, frames, grids, question)
        except ModelError as error:
            raise EngineError(f"window {observation.window_id}: {error}") from error
        cache = inference.new_cache(model, len(prompt.ids), 1, sampling.max_length)
        context, logits = inference.prefill(
            model,
            prompt.ids.to(model.device),
            prompt.positions.to(model.device),
            prompt.rope_delta,
            cache,
            model.vision(pixels, grids),
            prompt.image_index.to(model.device),
        )
        rule = StopRule(stop=None, end_of_turn=tokenizer.id("im_end"), pad=tokenizer.id("endoftext"))
        generator = torch.Generator(model.device).manual_seed(self.settings.seed)
        ids = inference.decode(model, context, logits, 1, sampling, rule, generator).rows()[0]
        # A model that does not close its answer is quoted as far as it came.
        return extract_text(tokenizer, ids)["answer"] or tokenizer.decode(ids).partition("<|im_end|>")[0].strip()

    def reset(self, reason: str) -> None:
        """Start the sequence of random seeds again; nothing else is carried from window to window."""
        self.windows = 0

    def close(self) -> None:
        """Free the weights and the cache."""
        self.loaded = self.cache = self._layout = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _model(self) -> Alpamayo:
        if self.loaded is None:
            raise EngineError("the engine is not loaded; call load first")
        return self.loaded.model

    def _step(self, observation: Observation) -> Prediction:
        s, model = self.settings, self._model()
        assert self.loaded is not None
        device = model.device
        timer, seed = StageTimer(device), s.seed + self.windows
        self.windows += 1
        prompt, context, logits = self._read(observation, timer)
        generator = torch.Generator(device).manual_seed(seed)
        # In front of the texts, so that it is the same whatever they draw; behind the images, which the device awaits.
        noise = inference.draw_noise(model, s.samples, s.noise_temperature, generator)
        # A 16 x 16 system: the host solves it while the device works, a GPU's solver would wait for the device.
        history_xyz, history_rot = ego_history(observation)
        v0 = float(model.action_space.initial_speed(history_xyz, history_rot))
        thought = self._reason(context, logits, generator)
        timer.lap("decode")
        departure = Departure(noise, v0, float(history_xyz[-1, 2]))
        numbers, error, texts = self._act(prompt, context, thought, departure, timer)
        metrics = {
            "tokens": float(max(thought.text.lengths)),
            "prompt_tokens": float(context.prefix),
            **thought.metrics,
        }
        if error is not None:
            metrics["flow_error"] = float(error.max())
        return Prediction(
            window_id=observation.window_id,
            t0_ns=observation.t0_ns,
            samples=trajectory_samples(numbers, texts),
            chosen=int(medoid(numbers[..., :2])) if s.samples > 1 else 0,
            initial_speed=v0,
            timings_ms=timer.finish(),
            metrics=metrics,
        )

    def _read(self, observation: Observation, timer: StageTimer) -> tuple[Prompt, Context, Tensor]:
        """Images and prompt into a context: the prompt with history, the context, and the first token's logits."""
        model = self._model()
        device = model.device
        pixels, grids = preprocess([c.images for c in observation.cameras], model.config, device, model.dtype)
        timer.lap("images")
        prompt, positions, image_index = self._layout_of(observation, grids)
        prompt = fuse_history(prompt, encode_history(*ego_history(observation), model.config))
        features = model.vision(pixels, grids)
        timer.lap("encode")
        cache = self._cache_for(len(prompt.ids))
        ids = prompt.ids.to(device, non_blocking=True)
        context, logits = inference.prefill(model, ids, positions, prompt.rope_delta, cache, features, image_index)
        timer.lap("prefill")
        return prompt, context, logits

    def _reason(self, context: Context, logits: Tensor, generator: torch.Generator) -> Reasoning:
        """One text per sample."""
        s = self.settings
        rule = self._stop_rule()
        text = inference.decode(self._model(), context, logits, s.samples, s.sampling, rule, generator, self.script)
        return Reasoning(text)

    def _stop_rule(self) -> StopRule:
        assert self.loaded is not None
        tokens, tokenizer = self.loaded.model.config.tokens, self.loaded.tokenizer
        return StopRule(
            stop=tokens.future_start,
            end_of_turn=tokenizer.id("im_end"),
            pad=tokenizer.id("endoftext"),
            forbidden=(tokens.traj_token_start, tokens.traj_vocab_size),
        )

    def _act(
        self, prompt: Prompt, context: Context, thought: Reasoning, departure: Departure, timer: StageTimer
    ) -> tuple[Tensor, Tensor | None, tuple[Spoken, ...]]:
        """Paths on the host, [samples, waypoints, 7] (position, yaw, speed, acceleration, curvature), and the texts.

        Between them an estimate of the actions' error [samples], where steps are left out.
        """
        s, model = self.settings, self._model()
        assert self.loaded is not None
        velocity = inference.velocity_field(model, context, thought.text)
        without: Velocity | None = None
        if s.guidance_weight != 1 and prompt.nav_span is not None:
            second = self._without_navigation(prompt, context, thought.text)
            without = inference.velocity_field(model, second, thought.text)
            timer.lap("guidance")
        speed = torch.full((s.samples,), departure.speed, device=model.device)
        _, path = inference.act(
            model, velocity, departure.noise, speed, departure.z, s.flow_steps, without, s.guidance_weight
        )
        timer.lap("action")
        columns = (path.yaw, path.speed, path.acceleration, path.curvature)
        numbers = torch.cat((path.xyz, *(column[..., None] for column in columns)), dim=-1)
        texts = spoken(thought, self.loaded.tokenizer)
        return numbers.cpu(), None, texts  # one copy to the host, which waits for the device

    def _layout_of(self, observation: Observation, grids: list[tuple[int, int]]) -> tuple[Prompt, Tensor, Tensor]:
        """The prompt without history, and its positions and image index on the device, kept from window to window."""
        assert self.loaded is not None
        model = self.loaded.model
        prompt = driving_prompt(
            self.loaded.tokenizer,
            model.config,
            *camera_layout(observation),
            grids,
            observation.nav_text,
        )
        if self._layout is None or self._layout[0] is not prompt:
            self._layout = (prompt, prompt.positions.to(model.device), prompt.image_index.to(model.device))
        return self._layout

    def _cache_for(self, prompt: int) -> KVCache:
        """The one cache, made larger where a prompt needs it."""
        s, model = self.settings, self._model()
        needed = prompt + s.samples * (s.sampling.max_length + model.config.action_space.n_waypoints)
        if self.cache is None or self.cache.slots < needed:
            self.cache = None  # freed before the larger one is allocated
            self.cache = inference.new_cache(model, prompt, s.samples, s.sampling.max_length)
        return self.cache

    def _without_navigation(self, prompt: Prompt, context: Context, text: Generated) -> Context:
        model = self._model()
        bare = without_navigation(prompt)
        assert prompt.nav_span is not None
        second, _ = inference.prefill_without_navigation(
            model,
            context,
            bare.ids.to(model.device),
            bare.positions.to(model.device),
            bare.rope_delta,
            prompt.nav_span[0],
            self.settings.samples,
        )
        inference.repeat_text(model, second, text)
        return second


def _precision_name(loaded: LoadedModel) -> str:
    """Type of the activations, and the stages' formats where they differ from it."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return dtype if loaded.precision == StagePrecision() else f"{dtype}, {loaded.precision.name}"
