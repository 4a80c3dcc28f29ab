"""The streaming engine: windows that share frames, guessed text, and flow steps that are left out, each by a setting.

What it carries from window to window is a `Stream`, advanced by the stamps of the frames: one new frame per camera or
several, none, or a gap are all the same to it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flashdrive_node.engine import speculative
from flashdrive_node.engine.drafter import Drafter, load_drafter
from flashdrive_node.engine.flow_schedule import integrate
from flashdrive_node.engine.plain import PlainEngine, Reasoning, ego_history
from flashdrive_node.engine.protocol import EngineError, EngineInfo, Observation, Prediction, Progress
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.speculative import DraftRule, Taps
from flashdrive_node.engine.stage_timer import StageTimer
from flashdrive_node.engine.stream import Stream
from flashdrive_node.engine.window_plan import plan_window
from flashdrive_node.model import inference
from flashdrive_node.model.errors import InputError, ModelError
from flashdrive_node.model.flow_matching import Velocity
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.images import preprocess, target_size
from flashdrive_node.model.inference import Context, Generated
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.prompt import Prompt, driving_prompt, fuse_history
from flashdrive_node.model.vision import VisionFeatures


class StreamingEngine(PlainEngine):
    """Engine protocol over a stream of windows."""

    #: The first window computes everything, the second what a new frame per camera takes.
    warm_up_windows = 2

    def __init__(self, settings: StreamingSettings, loaded: LoadedModel | None = None, drafter: Drafter | None = None):
        """`loaded` and `drafter` are networks to use in place of the settings' files."""
        super().__init__(settings, loaded)
        self.settings: StreamingSettings = settings
        self.drafter = drafter
        self.stream: Stream | None = None
        self._states: Tensor | None = None
        self._table: Tensor | None = None
        self._figures: dict[str, float] = {}

    def load(self, progress: Progress | None = None) -> EngineInfo:
        """Read the checkpoint, and the drafter if there is one, onto the device."""
        info = super().load(progress)
        s, model = self.settings, self._model()
        try:
            if s.drafter is not None and self.drafter is None:
                self.drafter = load_drafter(s.drafter, model.config, model.device, model.dtype)
        except (ModelError, OSError, RuntimeError) as error:
            raise EngineError(f"drafter {s.drafter} cannot be loaded: {error}") from error
        name = f"streaming ({s.stream.mode}) {model.config.model_type}"
        return replace(info, name=name + (", drafted" if self.drafter is not None else ""))

    def step(self, observation: Observation) -> Prediction:
        """Answer one observation; what it has in common with the last one is not computed again."""
        try:
            return super().step(observation)
        except BaseException:
            if self.stream is not None:
                self.stream.reset()
            raise

    def reset(self, reason: str) -> None:
        """Forget all windows, and start the sequence of random seeds again; nothing is allocated anew."""
        super().reset(reason)
        if self.stream is not None:
            self.stream.reset()

    def close(self) -> None:
        """Free the weights and the stream."""
        self.stream = self.drafter = self._states = self._table = None
        plan_window.cache_clear()  # plans hold index tensors on the device
        super().close()

    def _stream(self) -> Stream:
        if self.stream is None:
            s, model = self.settings, self._model()
            block = 0 if self.drafter is None else self.drafter.config.block_size
            room = speculative.slots_needed(s.samples, s.sampling, block)
            room += s.samples * model.config.action_space.n_waypoints
            self.stream = Stream(model, s.stream, room)
        return self.stream

    def _read(self, observation: Observation, timer: StageTimer) -> tuple[Prompt, Context, Tensor]:
        assert self.loaded is not None
        model, stream, cameras = self._model(), self._stream(), observation.cameras
        prompt = driving_prompt(
            self.loaded.tokenizer,
            model.config,
            [camera.camera_index for camera in cameras],
            len(cameras[0].images) if cameras else 0,
            self._grids(observation),
            observation.nav_text,
        )
        stamps = [camera.stamps_ns for camera in cameras]
        plan = stream.plan(prompt, stamps)
        frames = prompt.frames_per_camera
        new = [[c.images[i % frames] for i in plan.encode if i // frames == k] for k, c in enumerate(cameras)]
        features: VisionFeatures | None = None
        fused = fuse_history(prompt, encode_history(*ego_history(observation), model.config))
        if plan.encode:
            pixels, grids = preprocess([images for images in new if images], model.config, model.device, model.dtype)
            timer.lap("images")
            features = model.vision(pixels, grids)
            timer.lap("encode")
        ids = fused.ids.to(model.device, non_blocking=True)
        taps = None
        if self.drafter is not None:
            taps = Taps(self.drafter.config.target_layer_ids, self.drafter.config.context_length)
        context, logits = stream.prefill(plan, ids, stamps, features, None if taps is None else taps.observe)
        self._states = None if taps is None else taps.states()
        timer.lap("prefill")
        self._figures = {
            "new_images": float(len(plan.encode)),
            "computed_tokens": float(len(ids) if plan.rows is None else len(plan.rows.slots)),
        }
        return fused, context, logits

    def _grids(self, observation: Observation) -> list[tuple[int, int]]:
        """Patch rows and columns of every image, from its size alone."""
        config, grids = self._model().config, []
        for camera in observation.cameras:
            sizes = [image.shape[:2] for image in camera.images]
            if len(set(sizes)) > 1:
                raise InputError(
                    f"camera {camera.camera_index}: frames of one camera must have one size, found {sizes}"
                )
            vision = config.vision
            for height, width in sizes:
                h, w = target_size(height, width, config.min_pixels, config.max_pixels, vision.resize_factor)
                grids.append((h // vision.patch_size, w // vision.patch_size))
        return grids

    def _reason(self, context: Context, logits: Tensor, generator: torch.Generator) -> Reasoning:
        s, model = self.settings, self._model()
        rows = 1 if s.shared_text else s.samples
        owners: Tensor | None = None
        metrics = self._figures
        if self.drafter is None or self.script is not None:
            script = None if self.script is None else self.script[:rows]
            text = inference.decode(model, context, logits, rows, s.sampling, self._stop_rule(), generator, script)
        else:
            assert self._states is not None
            rule = self._stop_rule()
            drafted = speculative.decode(
                model, context, logits, self._states, rows, self._draft_rule(), s.sampling, rule, generator
            )
            text, owners = drafted.text, drafted.owners
            metrics |= {"accept_length": drafted.accept_length, "draft_rounds": float(drafted.rounds)}
        if s.shared_text and s.samples > 1:
            owners = torch.full((context.cache.used - context.prefix,), -1, device=model.device)
            text = Generated(text.tokens.expand(s.samples, -1), text.lengths * s.samples, text.stopped * s.samples)
        return Reasoning(text, owners, metrics)

    def _draft_rule(self) -> DraftRule:
        assert self.drafter is not None
        assert self.loaded is not None
        drafter, language = self.drafter, self.loaded.model.language
        forbidden = speculative.forbidden_bias(self.loaded.model, self._stop_rule())
        return DraftRule(
            propose=lambda known, states: drafter.propose(language, known, states, forbidden),
            layer_ids=drafter.config.target_layer_ids,
            block_size=drafter.config.block_size,
            context_length=drafter.config.context_length,
            closing=self.loaded.tokenizer.id("cot_end"),
        )

    def _flow(self, velocity: Velocity, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        schedule = self.settings.schedule
        if schedule is None:
            return super()._flow(velocity, noise)
        if self._table is None:
            self._table = schedule.table(noise.device)
        flowed = integrate(velocity, noise, self._table)
        return flowed.action, flowed.error if len(schedule.evaluated) > 1 else None
