"""``flashdrive benchmark``: time every stage of the model on this machine."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.benchmark import RandomDrive, Report, conditions, markdown, measure, measure_load
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint import CheckpointInfo
from flashdrive_node.model.checkpoint_writer import random_checkpoint, random_weights
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.presets import alpamayo_1_5_10b, alpamayo_r1_10b
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.model.tokenizer import prompt_subset_tokenizer

DIMENSIONS = {"10b": alpamayo_1_5_10b, "10b-r1": alpamayo_r1_10b}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory or Hugging Face id; or use --dims")
    parser.add_argument("--dims", choices=sorted(DIMENSIONS), help="dimensions of a release instead of a checkpoint")
    parser.add_argument("--random-weights", action="store_true", help="with --dims: weights drawn on the device")
    parser.add_argument(
        "--load-from", type=Path, metavar="DIR", help="with --dims: write a random sharded checkpoint there and load it"
    )
    parser.add_argument("--engine", choices=("plain", "streaming"), default="plain", help="default: plain")
    parser.add_argument(
        "--stream-mode", choices=("full", "features", "kv"), default="kv", help="streaming: what is kept (default: kv)"
    )
    parser.add_argument("--flow-schedule", help="streaming: flow steps to evaluate, such as 8:0,1,2,7 (default: all)")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 6], help="trajectories per window (default: 1 6)")
    parser.add_argument("--tokens", type=int, default=16, help="generated tokens, stop token included (default: 16)")
    parser.add_argument("--runs", type=int, default=20, help="measured windows per configuration (default: 20)")
    parser.add_argument("--warm-up", type=int, default=3, help="windows before (default: 3)")
    parser.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--precision", default="auto", help="float32, bfloat16 or auto")
    parser.add_argument("--image-size", default="1080x1920", help="height x width of the frames (default: 1080x1920)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write benchmark.json and benchmark.md there")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if (args.checkpoint is None) == (args.dims is None):
        raise InputError("either a checkpoint or --dims is required")
    if args.dims and not (args.random_weights or args.load_from):
        raise InputError("--dims needs --random-weights or --load-from: there are no weights of these dimensions here")
    try:
        height, width = (int(side) for side in args.image_size.split("x"))
    except ValueError:
        raise InputError(f"--image-size must be HEIGHTxWIDTH, found {args.image_size!r}") from None
    settings = [engine_settings(args, samples, (height, width)) for samples in args.samples]
    first = PlainEngine(settings[0])
    load: dict[str, float] = {}
    if args.dims and not args.load_from:
        first.loaded = random_model(DIMENSIONS[args.dims](), settings[0])
    elif args.load_from:
        config = DIMENSIONS[args.dims]()
        print(f"writing a random checkpoint of {args.dims} dimensions to {args.load_from}", flush=True)
        write_random_checkpoint(config, args.load_from, settings[0].torch_device)
        load = measure_load(first)
    else:
        load = measure_load(first)
    assert first.loaded is not None
    model = first.loaded.model
    drive = RandomDrive(model.config, (height, width), settings[0].cameras, settings[0].frames)
    measurements = []
    for each in settings:
        engine = make_engine(each, first.loaded)
        measurements.append(measure(engine, drive, args.tokens, args.warm_up, args.runs))
        engine.close()
    name = args.engine if args.engine == "plain" else f"streaming, mode {args.stream_mode}"
    if args.flow_schedule:
        name += f", flow schedule {args.flow_schedule}"
    report = Report(conditions(name, model, (height, width), args.dims is not None), measurements, load)
    print(markdown(report))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "benchmark.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        (args.out / "benchmark.md").write_text(markdown(report) + "\n")
        print(f"written to {args.out}")
    return 0


def engine_settings(args: argparse.Namespace, samples: int, image_size: tuple[int, int]) -> PlainSettings:
    """Settings of one configuration."""
    common: dict[str, Any] = {
        "checkpoint": str(args.checkpoint or args.load_from or args.dims),
        "device": args.device,
        "precision": args.precision,
        "samples": samples,
        "sampling": SamplingSettings(max_length=args.tokens + 1),
        "image_size": image_size,
    }
    if args.engine == "plain":
        if args.flow_schedule:
            raise InputError("--flow-schedule needs --engine streaming")
        return PlainSettings(**common)
    schedule = FlowSchedule.parse(args.flow_schedule) if args.flow_schedule else None
    return StreamingSettings(stream=StreamSettings(mode=args.stream_mode), schedule=schedule, **common)


def make_engine(settings: PlainSettings, loaded: LoadedModel) -> PlainEngine:
    """The engine that the settings are of."""
    if isinstance(settings, StreamingSettings):
        return StreamingEngine(settings, loaded)
    return PlainEngine(settings, loaded)


def random_model(config: AlpamayoConfig, settings: PlainSettings) -> LoadedModel:
    """A model with weights drawn on the device, and a tokenizer that knows the prompt's texts."""
    device = settings.torch_device
    model = Alpamayo.on_meta(config, settings.dtype)
    model.set_constants("release", device)
    random_weights(model, config, device)
    info = CheckpointInfo(Path("random weights"), "", "", 0, 0, 0.0)
    return LoadedModel(model, prompt_subset_tokenizer(config), info)


def write_random_checkpoint(config: AlpamayoConfig, directory: Path, device: torch.device) -> None:
    """A random checkpoint with everything that loading needs."""
    random_checkpoint(config, directory, device=device)
    vocabulary = files("flashdrive_node.model") / "data" / "qwen_prompt_vocab.json"
    (directory / "tokenizer.json").write_bytes(vocabulary.read_bytes())
