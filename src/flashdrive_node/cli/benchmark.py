"""``flashdrive benchmark``: time every stage of the model on this machine, configuration by configuration."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch

from flashdrive_node.engine.drafter import Drafter, load_drafter_of
from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.protocol import EngineError
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.benchmark import conditions, measure, measure_load
from flashdrive_node.evaluation.benchmark_report import Report, markdown, read_report
from flashdrive_node.evaluation.configurations import CONFIGURATIONS, Procedure
from flashdrive_node.evaluation.random_drive import RandomDrive
from flashdrive_node.evaluation.random_networks import random_drafter, random_model, write_random_checkpoint
from flashdrive_node.evaluation.roofline import measure_ceilings
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.presets import alpamayo_1_5_10b, alpamayo_r1_10b

logger = logging.getLogger(__name__)

DIMENSIONS = {"10b": alpamayo_1_5_10b, "10b-r1": alpamayo_r1_10b}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    standard = Procedure()
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory or Hugging Face id; or use --dims")
    parser.add_argument("--dims", choices=sorted(DIMENSIONS), help="dimensions of a release instead of a checkpoint")
    parser.add_argument("--random-weights", action="store_true", help="with --dims: weights drawn on the device")
    parser.add_argument(
        "--load-from", type=Path, metavar="DIR", help="with --dims: write a random sharded checkpoint there and load it"
    )
    parser.add_argument(
        "--configurations",
        nargs="+",
        choices=sorted(CONFIGURATIONS),
        default=list(CONFIGURATIONS),
        metavar="NAME",
        help=f"of {', '.join(CONFIGURATIONS)} (default: all of them)",
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 6], help="trajectories per window (default: 1 6)")
    parser.add_argument("--tokens", type=int, default=standard.tokens, help="generated, stop token included (16)")
    parser.add_argument(
        "--accept-length",
        type=float,
        default=standard.accept_length,
        metavar="N",
        help="tokens that a speculative round brings: an input, random weights have none (default: 5.6)",
    )
    parser.add_argument("--flow-schedule", default="8:0,1,2,7", help="evaluated flow steps (default: 8:0,1,2,7)")
    parser.add_argument("--drafter", type=Path, metavar="DIR", help="DFlash drafter (default: random, as published)")
    parser.add_argument(
        "--draft-vocabulary", type=int, metavar="N",
        help="tokens that drafters guess among, as 'train drafter --own-vocabulary' has it (default: all)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=standard.runs, help="measured windows per configuration (20)")
    parser.add_argument("--warm-up", type=int, default=standard.warm_up, help="windows before (default: 3)")
    parser.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--precision", default="auto", help="float32, bfloat16, a preset, STAGE=FORMAT,... or auto")
    parser.add_argument("--image-size", default="1080x1920", help="height x width of the frames (default: 1080x1920)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write benchmark.json, benchmark.md and benchmark.png")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: tables and picture of an old run")


def run(args: argparse.Namespace) -> int:
    """Print the tables. Returns 1 where a configuration could not be measured."""
    report = read_report(args.redraw) if args.redraw else _measure(args)
    print(markdown(report))
    if args.out:
        _write(report, args.out)
        (args.out / "benchmark.md").write_text(markdown(report) + "\n", encoding="utf-8")
        if report.measurements:
            from flashdrive_node.evaluation.benchmark_figure import figure_png

            (args.out / "benchmark.png").write_bytes(figure_png(report))
        print(f"written to {args.out}")
    return 1 if report.failures else 0


def _measure(args: argparse.Namespace) -> Report:
    settings = _settings(args)
    procedure = Procedure(
        args.tokens, args.accept_length, FlowSchedule.parse(args.flow_schedule), args.warm_up, args.runs
    )
    dims, device = args.dims and DIMENSIONS[args.dims](), settings.torch_device
    if args.load_from:
        print(f"writing a random checkpoint of {args.dims} dimensions to {args.load_from}", flush=True)
        write_random_checkpoint(dims, args.load_from, device)

    def load() -> LoadedModel:
        if dims and not args.load_from:
            return random_model(dims, device, settings.dtype, settings.stages)
        engine = PlainEngine(settings)
        engine.load()
        assert engine.loaded is not None
        return engine.loaded

    loaded, memory = measure_load(load, device)
    model = loaded.model
    # By whether it is a routine one.
    drafters: dict[bool, Drafter] = {}
    for routine in {CONFIGURATIONS[name].routine for name in args.configurations if CONFIGURATIONS[name].speculative}:
        drafters[routine] = (
            load_drafter_of(args.drafter, model, loaded.precision)
            if args.drafter and not routine
            else random_drafter(model, stages=loaded.precision, routine=routine)
        )
    if args.draft_vocabulary is not None:
        for each_drafter in drafters.values():
            each_drafter.restrict(model.language, torch.arange(args.draft_vocabulary))
    drafter_name = "none"
    if drafters:
        drafter_name = str(args.drafter or "random, of the published dimensions")
        drafter_name += "; routine drafter: random" if args.drafter and True in drafters else ""
        reduced = {one.vocabulary for one in drafters.values() if one.vocabulary is not None}
        drafter_name += "".join(f", guesses among {n} tokens" for n in sorted(reduced))
    drive = RandomDrive(model.config, settings.image_size, settings.cameras, settings.frames)
    report = Report(
        conditions(loaded, drive, procedure, args.dims is not None, drafter_name),
        measure_ceilings(model.device, model.dtype),
        load=memory,
    )
    for samples in args.samples:
        for name in args.configurations:
            each = replace(settings, samples=samples)
            try:
                drafter = drafters.get(CONFIGURATIONS[name].routine)
                report.measurements.append(measure(name, procedure, each, loaded, drafter, drive, report.ceilings))
            except (EngineError, RuntimeError) as error:  # no memory for one is no reason to lose the others
                logger.exception("%s, %d sample(s)", name, samples)
                report.failures[f"{name}, {samples} sample(s)"] = str(error)
            if args.out:
                _write(report, args.out)
    return report


def _settings(args: argparse.Namespace) -> PlainSettings:
    """What all configurations have in common."""
    if (args.checkpoint is None) == (args.dims is None):
        raise InputError("either a checkpoint or --dims is required")
    if args.draft_vocabulary is not None and args.draft_vocabulary < 1:
        raise InputError(f"--draft-vocabulary must be at least 1, found {args.draft_vocabulary}")
    if args.dims and not (args.random_weights or args.load_from):
        raise InputError("--dims needs --random-weights or --load-from: there are no weights of these dimensions here")
    try:
        height, width = (int(side) for side in args.image_size.split("x"))
    except ValueError:
        raise InputError(f"--image-size must be HEIGHTxWIDTH, found {args.image_size!r}") from None
    for samples in args.samples:
        PlainSettings("", samples=samples)  # refused before anything is loaded
    settings = PlainSettings(
        checkpoint=str(args.checkpoint or args.load_from or args.dims),
        device=args.device,
        precision=args.precision,
        image_size=(height, width),
    )
    if settings.torch_device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device} needs a CUDA device, found none")
    return settings


def _write(report: Report, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "benchmark.json").write_text(report.as_json(), encoding="utf-8")
