"""``flashdrive drive --ros``: the same scenes and scores, driven by the real node over DDS."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from flashdrive_node.cli.engine_options import overlay_of
from flashdrive_node.cli.replay import node_parameters
from flashdrive_node.evaluation.closed_loop_run import RunSettings
from flashdrive_node.evaluation.picture_files import FORMATS
from flashdrive_node.model.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the drive through ROS, beside those of every drive."""
    group = parser.add_argument_group("through ROS")
    group.add_argument("--ros", action="store_true", help="drive through the real node; scenes one after the other")
    group.add_argument("--real-time", action="store_true", help="with latency, instead of waiting for every answer")
    group.add_argument("--pictures", choices=FORMATS, default="jpeg", help="how pictures are sent (default: jpeg)")
    group.add_argument("--rig", default="sample", help="name or file of the camera rig (default: sample)")
    group.add_argument("--params", type=Path, metavar="FILE", help="parameter file of the node (ROS 2 YAML)")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any parameter of the node; repeatable"
    )
    group.add_argument(
        "--answer-timeout", type=float, default=30.0, metavar="S", help="longest wait for an answer (default: 30)"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace, size: tuple[int, int]) -> int:
    """Drive, and print the tables. Returns 0; 1 where the node failed; 2 on bad input; 130 on Ctrl-C."""
    from flashdrive_node.ros.closed_loop import drive_through_node
    from flashdrive_node.ros.scene_drive import DriveMode
    from flashdrive_node.ros.session import SessionError
    from flashdrive_node.ros.world_run import WorldOptions
    from flashdrive_node.runtime.rig import RigError

    parameters = _parameters(args)
    with tempfile.TemporaryDirectory(prefix="flashdrive_drive_") as scratch:
        options = WorldOptions(
            out=args.out or Path(scratch),
            run=RunSettings(args.split, args.seconds, batch=1),
            indices=tuple(range(args.first, args.first + args.scenes)),
            mode=DriveMode(args.real_time, args.answer_timeout),
            rig=args.rig,
            size=size,
            file_format=args.pictures,
            device=_world_device(args.device),
            videos=args.videos,
            quiet=args.quiet,
        )
        try:
            done = drive_through_node(options, parameters, args.params)
        except (RigError, SessionError) as error:
            print(f"flashdrive drive: {error}", file=sys.stderr)
            return 2
    print(done.tables, end="")
    if done.problem:
        print(f"flashdrive drive: {done.problem}", file=sys.stderr)
        return 1
    if args.out is not None:
        print(f"written to {args.out}")
    return done.code


def _parameters(args: argparse.Namespace) -> dict[str, object]:
    """Parameters of the node: those that the in-process run has too, and what is given for the node alone."""
    if args.checkpoint is None and args.engine != "fake" and args.params is None:
        raise InputError("a checkpoint is required with --ros, or --engine fake")
    if args.open_loop or args.policy is not None:
        raise InputError("--open-loop and --policy choose what runs in process; with --ros the node drives")
    if args.replan != 1:
        raise InputError(f"with --ros there is a plan for every window, found --replan {args.replan}")
    try:
        given = node_parameters(args)
    except ValueError as error:
        raise InputError(str(error)) from error
    values: dict[str, object] = {"precision": args.precision, "num_samples": args.samples or 1, "seed": args.seed}
    values |= {"temperature": args.temperature, "max_generation_length": 64, "device": args.device}
    for name in ("flow_steps", "stream_mode", "refresh_every", "flow_schedule"):
        if (value := getattr(args, name)) is not None:
            values[name] = value
    if (overlay := overlay_of(args)) is not None:
        values["overlay"] = str(overlay)
    if args.refresh_views:
        values["refresh_views"] = True
    return {**values, **given}


def _world_device(device: str) -> str:
    """Where the world is rendered: beside the model."""
    import torch

    if "," in device:
        raise InputError(f"one device is required with --ros, found {device}")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
