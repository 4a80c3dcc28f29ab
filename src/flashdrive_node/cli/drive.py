"""``flashdrive drive``: let a checkpoint drive in the procedural world, and score it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.closed_loop_run import ClosedLoopWork, RunSettings
from flashdrive_node.evaluation.devices import devices_of, spread
from flashdrive_node.evaluation.drive_report import DriveReport, as_json, markdown
from flashdrive_node.evaluation.policies import MODEL, POLICIES
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.world.draws import SPLITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    standard = RunSettings()
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory or Hugging Face id, for the model")
    parser.add_argument(
        "--policy",
        nargs="+",
        choices=POLICIES,
        default=list(POLICIES),
        metavar="NAME",
        help=f"who drives, one after the other: {', '.join(POLICIES)} (default: all of them)",
    )
    parser.add_argument("--split", choices=sorted(SPLITS), default=standard.split, help="scenes (default: test)")
    parser.add_argument("--scenes", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--first", type=int, default=0, help="index of the first one (default: 0)")
    parser.add_argument("--seconds", type=float, default=standard.seconds, help="length of a drive (default: 20)")
    parser.add_argument(
        "--replan", type=int, default=standard.replan, metavar="STEPS", help="steps of 0.1 s between plans (default: 1)"
    )
    parser.add_argument("--batch", type=int, default=standard.batch, help="scenes in lock-step (default: 512)")
    parser.add_argument("--size", default="288x160", help="width x height of the pictures (default: 288x160)")
    parser.add_argument("--device", default="auto", help="devices, with commas (default: all GPUs, or the CPU)")
    parser.add_argument("--precision", default="auto", help="float32, bfloat16 or auto")
    parser.add_argument("--samples", type=int, default=1, help="trajectories per plan; the middle one is driven (1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the reasoning (default: 0, greedy)")
    parser.add_argument("--flow-steps", type=int, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of the model's noise (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write closed_loop.json, .md and .png")


def run(args: argparse.Namespace) -> int:
    """Drive, print the tables and write the files."""
    if MODEL in args.policy and args.checkpoint is None:
        raise InputError("the model needs a checkpoint; or choose others with --policy")
    if args.scenes < 1:
        raise InputError(f"--scenes must be at least 1, found {args.scenes}")
    settings = RunSettings(args.split, args.seconds, args.replan, args.batch)
    devices = devices_of(args.device)
    indices = range(args.first, args.first + args.scenes)
    rows, wall_s = {}, {}
    for policy in args.policy:
        begun = time.perf_counter()
        work = ClosedLoopWork(policy, _model(args), settings, _size(args.size))
        rows[policy] = spread(work, indices, devices, policy)
        wall_s[policy] = round(time.perf_counter() - begun, 1)
    conditions = {
        "checkpoint": args.checkpoint,
        "devices": devices,
        "size": args.size,
        "samples": args.samples,
        "temperature": args.temperature,
        "flow_steps": args.flow_steps,
        "seed": args.seed,
        "wall_s": wall_s,
    }
    report = DriveReport(settings, rows, conditions)
    print(markdown(report))
    if args.out is not None:
        from flashdrive_node.evaluation.drive_figure import figure_png

        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "closed_loop.json").write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
        (args.out / "closed_loop.md").write_text(markdown(report) + "\n", encoding="utf-8")
        (args.out / "closed_loop.png").write_bytes(figure_png(report))
        print(f"written to {args.out}")
    return 0


def _model(args: argparse.Namespace) -> PlainSettings:
    return PlainSettings(
        checkpoint=str(args.checkpoint),
        precision=args.precision,
        samples=args.samples,
        sampling=SamplingSettings(temperature=args.temperature, max_length=64),
        flow_steps=args.flow_steps,
        seed=args.seed,
    )


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(side) for side in text.split("x"))
    except ValueError:
        raise InputError(f"--size must be WIDTHxHEIGHT, found {text!r}") from None
    return width, height
