"""Latency of the engine's stages: p50 and p99 per stage, memory, and a table to put into a README."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.config import AlpamayoConfig

GIB = 2**30


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
    """One configuration, measured."""

    samples: int
    tokens: int
    prompt_tokens: int
    windows: int
    stages: dict[str, StageTimes]
    #: Largest memory in use on the device over the measured windows; 0 on a CPU.
    peak_memory_bytes: int


@dataclass(frozen=True)
class Report:
    """Everything that one benchmark run found, with the conditions that it was found under."""

    conditions: dict[str, str]
    measurements: list[Measurement]
    load: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def conditions(engine: str, model: Alpamayo, image_size: tuple[int, int], random_weights: bool) -> dict[str, str]:
    """What a latency depends on: machine, versions, precision, sizes."""
    on_gpu = model.device.type == "cuda"
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "engine": engine,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": str(model.dtype).removeprefix("torch."),
        "parameters": f"{parameters:,}",
        "weights": "random: latencies only, no accuracy" if random_weights else "from the checkpoint",
        "frames": f"{image_size[1]} x {image_size[0]} uint8 in host memory",
        "clock": "CUDA events per stage, host clock for the total" if on_gpu else "host clock",
    }


class RandomDrive:
    """Endless windows of a straight drive at 10 m/s, one new frame per camera in each.

    Pixels are random (zeros would run faster than pictures do), from a small pool that is gone through in turn.
    """

    def __init__(
        self, config: AlpamayoConfig, image_size: tuple[int, int], cameras: Sequence[int], frames: int, seed: int = 0
    ):
        rng = np.random.default_rng(seed)
        self.frames = frames
        self.pictures = {
            camera: [rng.integers(0, 256, (*image_size, 3), dtype=np.uint8) for _ in range(frames + 1)]
            for camera in cameras
        }
        poses = config.history_poses
        self.xyz = np.zeros((poses, 3), np.float32)
        self.xyz[:, 0] = np.arange(1 - poses, 1) * config.action_space.dt * 10
        self.rot = np.tile(np.eye(3, dtype=np.float32), (poses, 1, 1))

    def window(self, index: int) -> Observation:
        """Window number `index`; frames are 0.1 s apart."""
        numbers = range(index, index + self.frames)
        stamps_ns = tuple(n * 100_000_000 for n in numbers)
        cameras = tuple(
            CameraFrames(camera, stamps_ns, tuple(pool[n % len(pool)] for n in numbers))
            for camera, pool in self.pictures.items()
        )
        return Observation(index, stamps_ns[-1], cameras, self.xyz, self.rot)


def measure(engine: PlainEngine, drive: RandomDrive, tokens: int, warm_up: int, runs: int) -> Measurement:
    """Time `runs` windows behind `warm_up` unmeasured ones, with texts of a fixed length.

    Args:
        engine: Loaded.
        drive: Gives the windows.
        tokens: Generated tokens per sample, the stop token included. Tokens are drawn as always and then replaced, so
            drawing them is part of the time.
        warm_up: Windows that are not counted.
        runs: Windows that are.
    """
    assert engine.loaded is not None
    model, samples = engine.loaded.model, engine.settings.samples
    ids = model.config.tokens
    text = torch.full((samples, tokens), 13)
    text[:, -1] = ids.future_start
    engine.script = text.to(model.device)
    on_gpu = model.device.type == "cuda"
    times: dict[str, list[float]] = {}
    prompt_tokens = 0
    for i in tqdm(range(warm_up + runs), desc=f"{samples} sample(s)", unit="window"):
        if i == warm_up and on_gpu:
            torch.cuda.synchronize(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
        prediction = engine.step(drive.window(i))
        if i >= warm_up:
            for stage, ms in prediction.timings_ms.items():
                times.setdefault(stage, []).append(ms)
            prompt_tokens = int(prediction.metrics["prompt_tokens"])
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else 0
    stages = {stage: StageTimes.of(values) for stage, values in times.items()}
    return Measurement(samples, tokens, prompt_tokens, runs, stages, peak)


def measure_load(engine: PlainEngine) -> dict[str, float]:
    """Load the engine's checkpoint and say how long it took and how much device memory it needed on the way."""
    device = engine.settings.torch_device
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start_s = time.perf_counter()
    engine.load()
    assert engine.loaded is not None
    weights = sum(t.nbytes for t in (*engine.loaded.model.parameters(), *engine.loaded.model.buffers()))
    found = {"seconds": time.perf_counter() - start_s, "weights_gib": weights / GIB}
    if on_gpu:
        found["peak_gib"] = (torch.cuda.max_memory_allocated(device) - before) / GIB
        found["peak_above_weights_gib"] = found["peak_gib"] - found["weights_gib"]
    return found


def markdown(report: Report) -> str:
    """The report as text: one table with a column per stage, and its conditions."""
    stages = list(dict.fromkeys(s for m in report.measurements for s in m.stages))
    head = ["samples", "tokens", "windows", "", *stages, "per token", "peak GiB"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for m in report.measurements:
        for name in ("p50", "p99"):
            cells = [f"{getattr(m.stages[s], f'{name}_ms'):.1f}" if s in m.stages else "" for s in stages]
            per_token = getattr(m.stages["decode"], f"{name}_ms") / m.tokens
            lead = [str(m.samples), str(m.tokens), str(m.windows)] if name == "p50" else ["", "", ""]
            peak = f"{m.peak_memory_bytes / GIB:.1f}" if name == "p50" and m.peak_memory_bytes else ""
            lines.append("| " + " | ".join([*lead, name, *cells, f"{per_token:.2f}", peak]) + " |")
    lines += ["", "Milliseconds. " + "; ".join(f"{k}: {v}" for k, v in report.conditions.items()) + "."]
    if report.measurements:
        lines[-1] += f" Prompt of {report.measurements[0].prompt_tokens} tokens."
    if report.load:
        lines += ["", "Loading: " + ", ".join(f"{k} {v:.2f}" for k, v in report.load.items()) + "."]
    return "\n".join(lines)
