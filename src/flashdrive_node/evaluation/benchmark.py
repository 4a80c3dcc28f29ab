"""Latency of the engine's stages, configuration by configuration, over one set of weights."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from tqdm import tqdm

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.protocol import EngineError, Observation, Prediction
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.configurations import CONFIGURATIONS, Procedure, window_workload
from flashdrive_node.evaluation.random_drive import RandomDrive
from flashdrive_node.evaluation.roofline import Ceilings, Floor, Workload, stage_floors
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.precision import StagePrecision
from flashdrive_node.model.presets import parameter_count

GIB = 2**30
#: Any word: what texts of a fixed length are made of.
_FILLER_TOKEN = 13


@dataclass(frozen=True)
class StageTimes:
    """Distribution of one stage's time over the measured windows, milliseconds."""

    p50_ms: float
    p99_ms: float
    min_ms: float

    @classmethod
    def of(cls, values_ms: Sequence[float]) -> StageTimes:
        """Summary of single measurements."""
        p50, p99 = np.percentile(values_ms, (50, 99))
        return cls(float(p50), float(p99), float(min(values_ms)))


@dataclass(frozen=True)
class Measurement:
    """One configuration at one number of samples, measured."""

    configuration: str
    samples: int
    windows: int
    work: Workload
    #: By stage, "total" by the host's clock, and "other": what no stage accounts for.
    stages: dict[str, StageTimes]
    #: Least times of the stages and in total on this device.
    floors: dict[str, Floor]
    #: Largest memory in use on the device over the measured windows; 0 on a CPU.
    peak_memory_bytes: int
    #: From the loaded weights to the first window, and for a reset between two windows.
    warm_up_s: float
    reset_ms: float

    @property
    def passes(self) -> int:
        """Passes of the language model that decoding takes."""
        return self.work.tokens if self.work.rounds is None else self.work.rounds


def conditions(
    loaded: LoadedModel, drive: RandomDrive, procedure: Procedure, random_weights: bool, drafter: str
) -> dict[str, str]:
    """What a latency depends on: machine, versions, precision, sizes, and what was put in."""
    model = loaded.model
    on_gpu = model.device.type == "cuda"
    dtype = str(model.dtype).removeprefix("torch.")
    height, width = drive.image_size
    return {
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": dtype if loaded.precision == StagePrecision() else f"{loaded.precision.name}, the rest {dtype}",
        "parameters": f"{parameter_count(model.config):,}",
        "weights": "random: latencies only, no accuracy" if random_weights else "from the checkpoint",
        "drafter": drafter,
        "frames": f"{width} x {height} uint8 in host memory, one new one per camera and window",
        "windows": f"{procedure.runs} behind {procedure.warm_up}",
        "tokens": f"{procedure.tokens}, forced",
        "accept length": f"{procedure.accept_length:g}, an input: {procedure.rounds} rounds",
        "clock": "CUDA events per stage, host clock for the total" if on_gpu else "host clock",
    }


def make_engine(
    name: str, procedure: Procedure, settings: PlainSettings, loaded: LoadedModel, drafter: Drafter | None
) -> PlainEngine:
    """The engine of a configuration, over weights that are loaded, with texts of a fixed length.

    Tokens are drawn, guessed and checked as always, and then replaced: those of the text by filler, and as many guesses
    of a round by right ones as the accept length stands for. Texts end as those of a trained model do, with the end of
    the reasoning and the start of the trajectory.

    Raises:
        InputError: An accept length beyond the drafter's blocks.
    """
    configuration = CONFIGURATIONS[name]
    settings = replace(settings, sampling=replace(settings.sampling, max_length=procedure.tokens + 1))
    engine = PlainEngine(settings, loaded)
    if configuration.mode is not None:
        common = {f.name: getattr(settings, f.name) for f in fields(PlainSettings)}
        schedule = procedure.schedule if configuration.flow else None
        streaming = StreamingSettings(**common, stream=StreamSettings(configuration.mode), schedule=schedule)
        engine = StreamingEngine(streaming, loaded, drafter if configuration.speculative else None)
        engine.scripted_gain = procedure.gain
    if configuration.speculative and drafter is not None and procedure.gain > drafter.config.block_size:
        raise InputError(
            f"accept length must be at most the drafter's block of {drafter.config.block_size}, "
            f"found {procedure.accept_length:g}"
        )
    text = torch.full((settings.samples, procedure.tokens), _FILLER_TOKEN)
    text[:, -2] = loaded.tokenizer.id("cot_end")
    text[:, -1] = loaded.model.config.tokens.future_start
    engine.script = text.to(loaded.model.device)
    return engine


def measure(
    name: str,
    procedure: Procedure,
    settings: PlainSettings,
    loaded: LoadedModel,
    drafter: Drafter | None,
    drive: RandomDrive,
    ceilings: Ceilings,
) -> Measurement:
    """Time one configuration, and compare it with the device's ceilings.

    Args:
        name: In `CONFIGURATIONS`.
        procedure: How.
        settings: What all configurations have in common, the number of samples among it.
        loaded: Weights; they stay.
        drafter: For the configurations with speculative decoding.
        drive: Gives the windows.
        ceilings: Of the device.

    Raises:
        EngineError: A window has no answer.
    """
    configuration, device = CONFIGURATIONS[name], loaded.model.device
    work = window_workload(loaded, drive, configuration, procedure, settings.samples)
    if configuration.speculative and drafter is not None:
        work = replace(work, draft_vocabulary=drafter.vocabulary)
    floors = stage_floors(
        loaded.model.config,
        work,
        loaded.model.dtype.itemsize,
        ceilings,
        drafter.config if drafter else None,
        loaded.precision,
    )
    engine = make_engine(name, procedure, settings, loaded, drafter)
    try:
        start_s = _synchronised_s(device)
        engine.warm_up()
        warm_up_s = _synchronised_s(device) - start_s
        times, peak = _measure_windows(engine, name, procedure, drive, work.rounds)
        start_s = _synchronised_s(device)
        engine.reset("benchmark")
        reset_ms = (_synchronised_s(device) - start_s) * 1e3
    finally:
        engine.close()
    stages = {stage: StageTimes.of(values) for stage, values in times.items()}
    return Measurement(name, settings.samples, procedure.runs, work, stages, floors, peak, warm_up_s, reset_ms)


def _measure_windows(
    engine: PlainEngine, name: str, procedure: Procedure, drive: RandomDrive, rounds: int | None
) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of every stage, window by window, and the largest memory in use."""
    device = engine.settings.torch_device
    times: dict[str, list[float]] = {}
    title = f"{name}, {engine.settings.samples} sample(s)"
    for i in tqdm(range(procedure.warm_up + procedure.runs), desc=title, unit="window"):
        if i == procedure.warm_up and device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        window = drive.window(i)
        if CONFIGURATIONS[name].ahead:
            _take_ahead(engine, window)
        prediction = engine.step(window)
        if i >= procedure.warm_up:
            for stage, ms in _stages_ms(prediction, rounds).items():
                times.setdefault(stage, []).append(ms)
    return times, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _take_ahead(engine: PlainEngine, window: Observation) -> None:
    """Show the newest frames of all cameras but the last to the engine, and let it finish with them."""
    assert isinstance(engine, StreamingEngine)
    if engine.stream is not None and engine.stream.windows:
        for camera in window.cameras[:-1]:
            engine.ingest(camera.camera_index, camera.stamps_ns[-1], camera.images[-1])
        _synchronised_s(engine.settings.torch_device)


def _stages_ms(prediction: Prediction, rounds: int | None) -> dict[str, float]:
    """A window's stages, what they leave of the total, and the total."""
    stages = dict(prediction.timings_ms)
    total = stages.pop("total")
    if rounds is not None:
        taken = prediction.metrics["draft_rounds"]
        if not taken:
            raise EngineError(f"window {prediction.window_id}: the text ended before a speculative round")
        # A length that is no whole number comes out as other rounds, and all rounds take the same time.
        scaled = stages["decode"] * rounds / taken
        total += scaled - stages["decode"]
        stages["decode"] = scaled
    return {**stages, "other": max(0.0, total - sum(stages.values())), "total": total}


def _synchronised_s(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_load(load: Callable[[], LoadedModel], device: torch.device) -> tuple[LoadedModel, dict[str, float]]:
    """Load or make a model, and say how long it took and how much device memory it needed on the way."""
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start_s = time.perf_counter()
    loaded = load()
    weights = sum(t.nbytes for t in (*loaded.model.parameters(), *loaded.model.buffers()))
    found = {"seconds": time.perf_counter() - start_s, "weights_gib": weights / GIB}
    if on_gpu:
        found["peak_gib"] = (torch.cuda.max_memory_allocated(device) - before) / GIB
        found["peak_above_weights_gib"] = found["peak_gib"] - found["weights_gib"]
    return loaded, found
