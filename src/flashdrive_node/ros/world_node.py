"""The world as a process: cameras, odometry and /clock of a simulated vehicle that follows the driving node.

``python -m flashdrive_node.ros.world_node --out DIR`` drives scenes through a driving node that takes its time from
/clock; a progress bar on stderr, the tables on stdout, the scores in DIR.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import rclpy
import torch
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from tqdm import tqdm

from flashdrive_node.evaluation.closed_loop_run import RunSettings
from flashdrive_node.evaluation.picture_files import FORMATS
from flashdrive_node.model.errors import InputError
from flashdrive_node.ros.scene_drive import DriveMode
from flashdrive_node.ros.world_run import World, WorldOptions, drive_scenes
from flashdrive_node.runtime.rig import RigError
from flashdrive_node.world.draws import SPLITS


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 all scenes driven, 1 the driving node failed or has gone, 2 bad input, 130 interrupted."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    # rclpy's own handlers would take the context away before the results are written.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    # One scene is too little for several threads, and the driving node needs them.
    torch.set_num_threads(1)
    node = Node("flashdrive_world", enable_rosout=False, start_parameter_services=False)
    try:
        options = _options(args)
        world = World(node, options)
    except (RigError, InputError) as error:
        print(f"flashdrive world: {error}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    total = len(options.indices) * options.run.steps
    with tqdm(total=total, unit="step", desc="drive", disable=args.quiet) as bar:
        result = drive_scenes(world, bar.update)
    world.close()
    rclpy.try_shutdown()
    print("\n".join(result.lines()), flush=True)
    if result.problem:
        print(f"flashdrive world: {result.problem}", file=sys.stderr)
        return 1
    return 130 if result.interrupted else 0


def arguments(options: WorldOptions, quiet: bool = False) -> list[str]:
    """The command line of this process for these options, whose scenes follow each other."""
    o, run, mode = options, options.run, options.mode
    values: list[Any] = [
        "--out",
        o.out,
        "--split",
        run.split,
        "--seconds",
        run.seconds,
        "--size",
        *o.size,
        "--device",
        o.device,
    ]
    values += ["--first", o.indices[0], "--scenes", len(o.indices), "--driver", o.driver, "--rig", o.rig]
    values += ["--pictures", o.file_format, "--answer-timeout", mode.answer_timeout_s]
    values += ["--ready-timeout", o.ready_timeout_s, "--silence", o.silence_s]
    values += [*(["--real-time"] if mode.real_time else []), *(["--quiet"] if quiet else [])]
    return [str(value) for value in values]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flashdrive_world", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the scores")
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--size", type=int, nargs=2, default=(288, 160), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--device", default="cpu", help="torch device of the world")
    parser.add_argument("--driver", default="/flashdrive_node", metavar="NAME", help="full name of the driving node")
    parser.add_argument("--ready-timeout", type=float, default=900.0, metavar="S")
    parser.add_argument("--silence", type=float, default=10.0, metavar="S", help="the node is gone after so long")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--real-time", action="store_true", help="go on with the wall clock, whatever the node does")
    parser.add_argument("--pictures", choices=FORMATS, default="jpeg")
    parser.add_argument("--rig", default="sample", help="name or file of the camera rig")
    parser.add_argument("--answer-timeout", type=float, default=30.0, metavar="S", help="longest wait for an answer")
    return parser.parse_args(argv)


def _options(args: argparse.Namespace) -> WorldOptions:
    if args.scenes < 1 or args.first < 0:
        raise InputError(f"--scenes must be at least 1 and --first 0, found {args.scenes} and {args.first}")
    return WorldOptions(
        out=args.out,
        run=RunSettings(args.split, args.seconds, batch=1),
        indices=tuple(range(args.first, args.first + args.scenes)),
        mode=DriveMode(args.real_time, args.answer_timeout),
        rig=args.rig,
        driver=args.driver,
        size=tuple(args.size),
        file_format=args.pictures,
        device=args.device,
        ready_timeout_s=args.ready_timeout,
        silence_s=args.silence,
    )


if __name__ == "__main__":
    sys.exit(main())
