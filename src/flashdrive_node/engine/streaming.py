"""The streaming engine: windows that share frames, guessed text, and flow steps that are left out, each by a setting.

What it carries from window to window is a `Stream`, advanced by the stamps of the frames: one new frame per camera or
several, none, or a gap are all the same to it. On a GPU every stage is a captured graph.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdrive_node.engine import speculative
from flashdrive_node.engine.arrivals import Arrivals
from flashdrive_node.engine.draft_rule import DraftRule, Script, SkipRule, block_sizes
from flashdrive_node.engine.drafted_texts import Speculated
from flashdrive_node.engine.drafter import Drafter, PromptMemory, load_drafter_of
from flashdrive_node.engine.flow_pass import FlowPass, SampledTexts, WaypointContext
from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.engine.graphs import Graphs
from flashdrive_node.engine.guidance import UnguidedContext
from flashdrive_node.engine.image_encoder import ImageEncoder
from flashdrive_node.engine.novelty import Novelty
from flashdrive_node.engine.observations import ego_history
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.prediction import Departure, Reasoning, Spoken, spoken
from flashdrive_node.engine.prompt_reader import PromptReader
from flashdrive_node.engine.prompt_slots import prompt_room, tapped_tokens
from flashdrive_node.engine.protocol import EngineError, EngineInfo, Observation, Prediction, Progress
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.speculative import TextDecoder
from flashdrive_node.engine.stage_timer import StageTimer
from flashdrive_node.engine.stream import Stream
from flashdrive_node.engine.taps import Tapped
from flashdrive_node.engine.window_plan import plan_window
from flashdrive_node.model.errors import InputError, ModelError
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.images import target_size
from flashdrive_node.model.inference import Context, Generated
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.prompt import Prompt, driving_prompt, fuse_history


@dataclass(frozen=True, eq=False)
class Stages:
    """What works on one cache behind the prefill."""

    cache: KVCache
    script: Tensor | None
    #: What a routine drafter looks at of the prompt.
    memory: PromptMemory | None
    decoder: TextDecoder
    waypoints: WaypointContext
    flow: FlowPass
    #: Where navigation guidance is wanted.
    unguided: UnguidedContext | None


class StreamingEngine(PlainEngine):
    """Engine protocol over a stream of windows."""

    #: Two windows compute everything, the others what a new frame per camera takes. A stage is captured the second time
    #: that it runs, and the third shows it at work.
    warm_up_windows = 5

    def __init__(self, settings: StreamingSettings, loaded: LoadedModel | None = None, drafter: Drafter | None = None):
        """`loaded` and `drafter` are networks to use in place of the settings' files."""
        super().__init__(settings, loaded)
        self.settings: StreamingSettings = settings
        if settings.frames_ahead:
            self.warm_up_windows += 3
        self.drafter = drafter
        #: Tokens that a block gains where the text is scripted.
        self.scripted_gain = 1
        self.graphs: Graphs | None = None
        self.stream: Stream | None = None
        self.arrivals: Arrivals | None = None
        self.reader: PromptReader | None = None
        self.novelty = Novelty()
        self._stages: Stages | None = None
        self._said: Speculated | None = None
        self._figures: dict[str, float] = {}
        #: Of the last window, with what it follows from.
        self._layout_and_prompt: tuple[Hashable, Prompt] | None = None

    def load(self, progress: Progress | None = None) -> EngineInfo:
        """Read the checkpoint, and the drafter if there is one, onto the device."""
        info = super().load(progress)
        s, model = self.settings, self._model()
        try:
            if s.drafter is not None and self.drafter is None:
                stages = self.loaded.precision if self.loaded is not None else None
                self.drafter = load_drafter_of(s.drafter, model, stages)
        except (ModelError, OSError, RuntimeError) as error:
            raise EngineError(f"drafter {s.drafter} cannot be loaded: {error}") from error
        name = f"streaming ({s.stream.mode}) {model.config.model_type}"
        return replace(info, name=name + (", drafted" if self.drafter is not None else ""))

    def warm_up(self, progress: Progress | None = None) -> None:
        """Grey windows through every stage; on a GPU the stages are captured meanwhile."""
        super().warm_up(progress)
        if self._stages is not None:
            with torch.inference_mode():
                for _ in range(2):
                    self._stages.decoder.rehearse()
        if self.graphs is not None and progress:
            captures, seconds = self.graphs.captures, self.graphs.capture_s
            progress(1.0, f"warm, {captures} stages captured in {seconds:.1f} s" if captures else "warm")

    def _rehearse(self, window: int) -> None:
        if window >= type(self).warm_up_windows:  # those that frames ahead add
            for camera in self._grey_window(window).cameras:
                self.ingest(camera.camera_index, camera.stamps_ns[-1], camera.images[-1])
        super()._rehearse(window)

    def _grey_window(self, window: int) -> Observation:
        # The second one has no frame of the first.
        return super()._grey_window(window + self.settings.frames if window else 0)

    def step(self, observation: Observation) -> Prediction:
        """Answer one observation; what it has in common with the last one is not computed again."""
        before = 0 if self.graphs is None else self.graphs.captures
        try:
            prediction = super().step(observation)
        except BaseException:
            self._forget()
            raise
        captured = 0 if self.graphs is None else self.graphs.captures - before
        if captured:  # which explains a slow window
            prediction.metrics["graph_captures"] = float(captured)
        return prediction

    @torch.inference_mode()
    def ingest(self, camera_index: int, stamp_ns: int, image: NDArray[np.uint8]) -> None:
        """Take a camera's frame of the coming window as soon as it is there, so that `step` finds the work done.

        The frame is encoded at once. The language model takes it in as soon as the cameras in front of it have theirs,
        but for the last camera's, which goes with the text. A window that comes without the frame is answered all the
        same: the frame is then one of an older window. Nothing is waited for.

        Args:
            camera_index: As in `CameraFrames`.
            stamp_ns: Of the frame.
            image: RGB, uint8 [height, width, 3].

        Raises:
            EngineError: The frame cannot be used. The engine is reset and usable.
        """
        stream, arrivals = self._streaming()
        try:
            arrivals.take(camera_index, stamp_ns, image)
            while stream.next_camera in arrivals.waiting:
                camera = stream.next_camera
                if not stream.advance(camera, *arrivals.waiting[camera]):
                    break
                del arrivals.waiting[camera]
        except ModelError as error:
            self._forget()
            raise EngineError(f"frame of camera {camera_index} at {stamp_ns} ns: {error}") from error
        except BaseException:
            self._forget()
            raise

    def reset(self, reason: str) -> None:
        """Forget all windows, and start the sequence of random seeds again; nothing is allocated anew."""
        super().reset(reason)
        self._forget()

    def _forget(self) -> None:
        self.novelty.reset()
        if self.arrivals is not None:
            self.arrivals.waiting.clear()
        if self.stream is not None:
            self.stream.reset()

    def close(self) -> None:
        """Free the weights and the stream."""
        if self.graphs is not None:
            self.graphs.clear()
        self.graphs = self.stream = self.arrivals = self.drafter = self.reader = self._stages = None
        self._layout_and_prompt = None
        plan_window.cache_clear()  # plans hold index tensors on the device
        super().close()

    def _streaming(self) -> tuple[Stream, Arrivals]:
        """The stream and what feeds it, made for the first window."""
        if self.stream is None or self.arrivals is None:
            s, model, tapped, block = self.settings, self._model(), None, 1
            if self.drafter is not None:
                assert self.loaded is not None
                config, reach = self.drafter.config, prompt_room(self.loaded.tokenizer, model.config)
                block, tapped = config.block_size, Tapped(config.target_layer_ids, tapped_tokens(config, reach))
            room = speculative.slots_needed(self._rows, s.sampling, block)
            room += s.samples * model.config.action_space.n_waypoints
            self.graphs = Graphs(model.device, s.graphs)
            self.stream = Stream(model, s.stream, room, self.graphs, tapped)
            self.arrivals = Arrivals(ImageEncoder(model, self.graphs))
            if self.drafter is not None and self.drafter.config.variant == "routine":
                self.reader = PromptReader(self.drafter, self.stream, reach)
        return self.stream, self.arrivals

    @property
    def _rows(self) -> int:
        """Texts of a window."""
        return 1 if self.settings.shared_text else self.settings.samples

    def _stages_on(self, cache: KVCache) -> Stages:
        """The stages behind the prefill; made anew where what they work on is another."""
        stages, script = self._stages, self.script
        memory = None if self.reader is None else self.reader.memory
        if stages is not None and stages.cache is cache and stages.script is script and stages.memory is memory:
            return stages
        s, model, graphs = self.settings, self._model(), self.graphs
        draft = None if self.drafter is None else self._draft_rule(self.drafter)
        decoder = TextDecoder(
            model,
            cache,
            self._rows,
            s.sampling,
            self._stop_rule(),
            draft,
            graphs,
            None if script is None else Script(script[: self._rows], self.scripted_gain),
        )
        schedule = s.schedule or FlowSchedule.uniform(s.flow_steps or model.config.flow.num_inference_steps)
        flow = FlowPass(model, s.samples, schedule.table(model.device), graphs)
        unguided = None if s.guidance_weight == 1 else UnguidedContext(model, decoder, s.samples)
        self._stages = Stages(cache, script, memory, decoder, WaypointContext(model, cache, s.samples), flow, unguided)
        return self._stages

    def _read(self, observation: Observation, timer: StageTimer) -> tuple[Prompt, Context, Tensor]:
        assert self.loaded is not None
        config = self.loaded.model.config
        stream, arrivals = self._streaming()
        prompt = self._prompt_of(observation)
        stamps = [camera.stamps_ns for camera in observation.cameras]
        plan = stream.plan(prompt, stamps)
        new = arrivals.begin(plan.encode, prompt, observation.cameras)  # copied by other threads meanwhile
        if self.reader is not None:
            self.reader.place(prompt)
        stream.age(plan)
        features = arrivals.features(new, prompt, timer)
        fused = fuse_history(prompt, encode_history(*ego_history(observation), config))
        context, logits = stream.prefill(plan, fused.ids, stamps, features)
        timer.lap("prefill")
        self._figures = {"new_images": float(len(plan.encode)), "computed_tokens": float(len(plan.rows.slots))}
        return fused, context, logits

    def _prompt_of(self, observation: Observation) -> Prompt:
        """Without history; windows of one layout and navigation text share it."""
        assert self.loaded is not None
        cameras, text = observation.cameras, observation.nav_text
        layout = tuple((camera.camera_index, *(image.shape for image in camera.images)) for camera in cameras), text
        if self._layout_and_prompt is None or self._layout_and_prompt[0] != layout:
            indices, frames = [camera.camera_index for camera in cameras], len(cameras[0].images) if cameras else 0
            tokenizer, config = self.loaded.tokenizer, self.loaded.model.config
            prompt = driving_prompt(tokenizer, config, indices, frames, self._grids(observation), text)
            self._layout_and_prompt = layout, prompt
        return self._layout_and_prompt[1]

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
        s, stream = self.settings, self.stream
        assert stream is not None
        states = stream.states
        if states is not None and self.drafter is not None:
            states = states[-self.drafter.config.context_length :]
        self._said = said = self._stages_on(context.cache).decoder.decode(context, logits, states, generator)
        metrics, text, routine = self._figures, said.text, said.routine
        if self.drafter is None:
            routine = ()
        else:
            metrics |= {"accept_length": said.accept_length, "draft_rounds": float(said.rounds)}
            metrics |= self.novelty.see(routine)
        if s.shared_text:
            text = Generated(text.tokens.expand(s.samples, -1), text.lengths * s.samples, text.stopped * s.samples)
            routine = routine * s.samples
        return Reasoning(text, metrics, routine)

    def _act(
        self, prompt: Prompt, context: Context, thought: Reasoning, departure: Departure, timer: StageTimer
    ) -> tuple[Tensor, Tensor | None, tuple[Spoken, ...]]:
        s, stages, said = self.settings, self._stages, self._said
        assert self.loaded is not None
        assert stages is not None
        assert said is not None
        first, end = stages.decoder.stretches(context)
        spans = [(slot, count) for slot, count in zip(first, said.slots, strict=True)]
        if s.shared_text:
            spans *= s.samples
        stages.waypoints.place(context, SampledTexts(tuple(spans), thought.text.lengths, end))
        without: WaypointContext | None = None
        if stages.unguided is not None and prompt.nav_span is not None:
            without = stages.unguided.follow(prompt, context, said.text)
            timer.lap("guidance")
        flow = stages.flow
        flow.start(stages.waypoints, departure.noise, departure.speed, departure.z, without, s.guidance_weight)
        timer.lap("action")
        texts = spoken(thought, self.loaded.tokenizer)  # while the device works
        numbers, error = flow.finish()
        return numbers, error if s.schedule is not None and len(s.schedule.evaluated) > 1 else None, texts

    def _draft_rule(self, drafter: Drafter) -> DraftRule:
        assert self.loaded is not None
        language = self.loaded.model.language
        forbidden = speculative.forbidden_bias(self.loaded.model, self._stop_rule())
        reader, confidence = self.reader, self.settings.draft_confidence
        memory = None if reader is None else reader.memory
        skip: SkipRule | None = None
        if confidence:
            skip = SkipRule(
                lambda known, states, place: drafter.propose_surely(language, known, states, forbidden, memory, place),
                block_sizes(drafter.config.block_size),
                confidence,
            )
        return DraftRule(
            propose=lambda known, states, place: drafter.propose(language, known, states, forbidden, memory, place),
            layer_ids=drafter.config.target_layer_ids,
            block_size=drafter.config.block_size,
            context_length=drafter.config.context_length,
            closing=self.loaded.tokenizer.id("cot_end"),
            begin=None if reader is None else reader.read,
            skip=skip,
        )
