"""``flashdrive drive``: let a checkpoint drive in the procedural world, and score it."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from flashdrive_node.cli import drive_ros
from flashdrive_node.cli.engine_options import add_stream_options, overlay_of, refuse_without_streaming, stream_options
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.evaluation import drive_report, open_loop_report
from flashdrive_node.evaluation.closed_loop_run import ClosedLoopWork, RunSettings
from flashdrive_node.evaluation.devices import devices_of, spread
from flashdrive_node.evaluation.drive_report import DriveReport
from flashdrive_node.evaluation.open_loop import OpenLoopWork
from flashdrive_node.evaluation.open_loop_report import OpenLoopReport
from flashdrive_node.evaluation.policies import EXPERT, HISTORY, MODEL, POLICIES, history_file
from flashdrive_node.evaluation.world_windows import WindowChoice
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.world.draws import SPLITS

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    standard = RunSettings()
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory or Hugging Face id, for the model")
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=POLICIES,
        metavar="NAME",
        help=f"who drives, one after the other: {', '.join(POLICIES)} (default: all that the checkpoint has)",
    )
    parser.add_argument(
        "--open-loop",
        action="store_true",
        help="do not drive: plan at moments of the expert's drives, and compare paths and stated decisions",
    )
    parser.add_argument("--split", choices=sorted(SPLITS), default=standard.split, help="scenes (default: test)")
    parser.add_argument("--scenes", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--first", type=int, default=0, help="index of the first one (default: 0)")
    parser.add_argument("--seconds", type=float, default=standard.seconds, help="length of a drive (default: 20)")
    parser.add_argument(
        "--replan", type=int, default=standard.replan, metavar="STEPS", help="steps of 0.1 s between plans (default: 1)"
    )
    parser.add_argument(
        "--batch", type=int, default=standard.policy_batch, help="windows that the model gets at once (default: 256)"
    )
    parser.add_argument("--size", default="288x160", help="width x height of the pictures (default: 288x160)")
    parser.add_argument("--device", default="auto", help="devices, with commas (default: all GPUs, or the CPU)")
    parser.add_argument("--precision", default="auto", help="auto, float32, bfloat16, a preset or STAGE=FORMAT,...")
    parser.add_argument("--samples", type=int, help="trajectories per plan (default: 1; open loop: 6)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the reasoning (default: 0, greedy)")
    parser.add_argument("--flow-steps", type=int, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of the model's noise (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write closed_loop or open_loop .json, .md and .png")
    parser.add_argument(
        "--videos", type=int, default=0, metavar="N", help="write an MP4 of the first N scenes to --out"
    )
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine", choices=("plain", "streaming", "fake"), help="how the model runs; fake with --ros (default: plain)"
    )
    add_stream_options(group)
    drive_ros.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Drive, print the tables and write the files."""
    if args.scenes < 1:
        raise InputError(f"--scenes must be at least 1, found {args.scenes}")
    if args.videos and args.out is None:
        raise InputError("--videos needs --out, where they are written")
    if args.engine != "streaming":
        refuse_without_streaming(args)
    if args.ros:
        return drive_ros.run(args, _size(args.size))
    if args.engine == "fake":
        raise InputError("--engine fake is for the node and needs --ros; plain or streaming is required")
    if args.engine == "streaming" and args.open_loop:
        raise InputError("--open-loop plans at single moments, found --engine streaming; see flashdrive evaluate")
    args.policy = args.policy or _policies(args.checkpoint, args.open_loop)
    needy = sorted({MODEL, HISTORY}.intersection(args.policy))
    if needy and args.checkpoint is None:
        raise InputError(f"a checkpoint is required for {' and '.join(needy)}; or choose others with --policy")
    return _open_loop(args) if args.open_loop else _closed_loop(args)


def _policies(checkpoint: str | None, open_loop: bool) -> list[str]:
    """All that can be measured: open loop against the expert, and the history baseline where one was trained."""
    left_out = {EXPERT} if open_loop else set()
    if checkpoint is not None and history_file(checkpoint) is None:
        logger.info("%s has no history baseline, so that one is left out", checkpoint)
        left_out.add(HISTORY)
    return [policy for policy in POLICIES if policy not in left_out]


def _closed_loop(args: argparse.Namespace) -> int:
    settings = RunSettings(args.split, args.seconds, args.replan, policy_batch=args.batch)
    begun = time.perf_counter()
    filmed = tuple(_indices(args)[: args.videos]) if args.out is not None else ()
    work = ClosedLoopWork(tuple(args.policy), _model(args), settings, _size(args.size), filmed, args.out or Path())
    driven = spread(work, _indices(args), devices_of(args.device), "closed loop")
    rows = {policy: [row for name, row in driven if name == policy] for policy in args.policy}
    report = DriveReport(settings, rows, _conditions(args, begun))
    text = drive_report.markdown(report)
    print(text)
    if args.out is not None:
        from flashdrive_node.evaluation.drive_figure import figure_png

        _write(args.out, "closed_loop", drive_report.as_json(report), text, figure_png(report))
    return 0


def _open_loop(args: argparse.Namespace) -> int:
    choice = WindowChoice(args.split, seed=args.seed)
    begun = time.perf_counter()
    work = OpenLoopWork(tuple(args.policy), _model(args), choice, args.batch, _size(args.size))
    answered = spread(work, _indices(args), devices_of(args.device), "open loop")
    rows = {policy: [row for row in answered if row.policy == policy] for policy in args.policy}
    report = OpenLoopReport(choice, rows, _conditions(args, begun))
    text = open_loop_report.markdown(report)
    print(text)
    if args.out is not None:
        from flashdrive_node.evaluation.open_loop_figure import figure_png

        _write(args.out, "open_loop", open_loop_report.as_json(report), text, figure_png(report))
    return 0


def _indices(args: argparse.Namespace) -> range:
    return range(args.first, args.first + args.scenes)


def _conditions(args: argparse.Namespace, begun: float) -> dict[str, Any]:
    names = ("checkpoint", "first", "scenes", "size", "precision", "temperature", "flow_steps", "seed")
    found = {name: getattr(args, name) for name in names}
    streaming = ("engine", "overlay", "stream_mode", "refresh_every", "refresh_views", "flow_schedule")
    found |= {name: str(value) for name in streaming if (value := getattr(args, name))}
    wall_s = round(time.perf_counter() - begun, 1)
    return {**found, "samples": _samples(args), "devices": devices_of(args.device), "wall_s": wall_s}


def _write(out: Path, name: str, values: dict[str, Any], text: str, picture: bytes) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (out / f"{name}.png").write_bytes(picture)
    print(f"written to {out}")


def _samples(args: argparse.Namespace) -> int:
    """Several show what `minADE` needs; driving takes one."""
    return int(args.samples or (6 if args.open_loop else 1))


def _model(args: argparse.Namespace) -> PlainSettings:
    common: dict[str, Any] = {
        "checkpoint": str(args.checkpoint),
        "overlay": overlay_of(args),
        "precision": args.precision,
        "samples": _samples(args),
        "sampling": SamplingSettings(temperature=args.temperature, max_length=64),
        "flow_steps": args.flow_steps,
        "seed": args.seed,
    }
    if args.engine == "streaming":
        return StreamingSettings(**stream_options(args), **common)
    return PlainSettings(**common)


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(side) for side in text.split("x"))
    except ValueError:
        raise InputError(f"--size must be WIDTHxHEIGHT, found {text!r}") from None
    return width, height
