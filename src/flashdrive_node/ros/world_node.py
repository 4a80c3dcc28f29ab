"""The executable ``flashdrive_world``: cameras, odometry and /clock of a vehicle that follows the driving node.

``flashdrive_world --out DIR`` drives scenes through a driving node that takes its time from /clock; a progress bar on
stderr, the tables on stdout, the scores in DIR.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

import rclpy
import torch
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from tqdm import tqdm

from flashdrive_node.evaluation.closed_loop_run import RunSettings
from flashdrive_node.evaluation.picture_files import FORMATS
from flashdrive_node.model.errors import InputError
from flashdrive_node.ros.scene_drive import DriveMode
from flashdrive_node.ros.world_run import World, WorldOptions, WorldResult, drive_scenes
from flashdrive_node.runtime.rig import RigError
from flashdrive_node.world.draws import SPLITS


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 all scenes driven, 1 the driving node failed or has gone, 2 bad input, 130 interrupted."""
    given = sys.argv[1:] if argv is None else argv
    cut = given.index("--ros-args") if "--ros-args" in given else len(given)
    # rclpy's own handlers would take the context away before the results are written.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt_once)
    rclpy.init(args=["flashdrive_world", *given[cut:]], signal_handler_options=SignalHandlerOptions.NO)
    # One scene is too little for several threads, and the driving node needs them.
    torch.set_num_threads(1)
    try:
        result = _run(options_of(given[:cut]))
    except (RigError, InputError) as error:
        print(f"flashdrive_world: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        rclpy.try_shutdown()
    print("\n".join(result.lines()), flush=True)
    if result.problem:
        print(f"flashdrive_world: {result.problem}", file=sys.stderr)
        return 1
    return 130 if result.interrupted else 0


def _run(options: WorldOptions) -> WorldResult:
    node = Node("flashdrive_world", enable_rosout=False, start_parameter_services=False)
    world = World(node, options)
    total = len(options.indices) * options.run.steps
    with tqdm(total=total, unit="step", desc="drive", disable=options.quiet) as bar:
        result = drive_scenes(world, bar.update)
    world.close()
    return result


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    # The terminal sends one, launch another; the second one must not keep the results from being written.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def arguments(options: WorldOptions) -> list[str]:
    """The command line of this process for these options, whose scenes follow each other."""
    o, run, mode = options, options.run, options.mode
    values = {
        "out": o.out,
        "split": run.split,
        "first": o.indices[0],
        "scenes": len(o.indices),
        "seconds": run.seconds,
        "answer-timeout": mode.answer_timeout_s,
        "rig": o.rig,
        "driver": o.driver,
        "pictures": o.file_format,
        "device": o.device,
        "ready-timeout": o.ready_timeout_s,
        "silence": o.silence_s,
        "videos": o.videos,
    }
    given = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    flags = {"--real-time": mode.real_time, "--quiet": o.quiet}
    return [*given, "--size", *map(str, o.size), *(flag for flag, on in flags.items() if on)]


def options_of(argv: list[str]) -> WorldOptions:
    """The options that a command line asks for.

    Raises:
        InputError: Numbers that make no sense.
    """
    standard = WorldOptions(out=Path())
    parser = argparse.ArgumentParser(prog="flashdrive_world", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the scores")
    parser.add_argument("--split", choices=sorted(SPLITS), default=standard.run.split)
    parser.add_argument("--first", type=int, default=0, help="index of the first scene")
    parser.add_argument("--scenes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=standard.run.seconds)
    parser.add_argument("--real-time", action="store_true", help="go on with the wall clock, whatever the node does")
    parser.add_argument("--answer-timeout", type=float, default=standard.mode.answer_timeout_s, metavar="S")
    parser.add_argument("--rig", default=standard.rig, help="name or file of the camera rig")
    parser.add_argument("--driver", default=standard.driver, metavar="NAME", help="full name of the driving node")
    parser.add_argument("--size", type=int, nargs=2, default=standard.size, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--pictures", choices=FORMATS, default=standard.file_format)
    parser.add_argument("--device", default=standard.device, help="torch device of the world")
    parser.add_argument("--ready-timeout", type=float, default=standard.ready_timeout_s, metavar="S")
    parser.add_argument("--silence", type=float, default=standard.silence_s, metavar="S", help="gone after so long")
    parser.add_argument("--videos", type=int, default=0, help="so many scenes become an MP4")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
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
        videos=args.videos,
        quiet=args.quiet,
    )


if __name__ == "__main__":
    sys.exit(main())
