"""``flashdrive replay``: plays a rosbag2 through the node, without a ROS install, and says what came of it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from flashdrive_node.bundled import BUNDLED, bundled_drive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("bag", type=Path, help="rosbag2 directory or file, or 'bundled'")
    parser.add_argument("--rig", default="sample", help="name or file of the camera rig (default: sample)")
    parser.add_argument("--params", type=Path, metavar="FILE", help="parameter file of the node (ROS 2 YAML)")
    parser.add_argument(
        "--engine", choices=("plain", "streaming", "fake"), help="default: plain with --checkpoint, else fake"
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="directory or Hugging Face id of a checkpoint, or 'bundled'"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other parameter of the node; repeatable"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="seconds of the recording per second (default: 1.0)")
    parser.add_argument("--loop", action="store_true", help="begin again at the end, until Ctrl-C")
    parser.add_argument("--start-offset", type=float, default=0.0, metavar="S", help="skip the first seconds")
    parser.add_argument("--duration", type=float, metavar="S", help="play this many seconds")
    parser.add_argument("--record", type=Path, metavar="OUT.mcap", help="new rosbag2 directory for all outputs")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.html, report.json and summary.png")
    parser.add_argument("--load-timeout", type=float, default=900.0, metavar="S", help="for the engine (default: 900)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Replay. Returns 0; 1 where the node ended or nothing was published; 2 on bad input; 130 on Ctrl-C."""
    from flashdrive_node.evaluation.replay_report import make_report
    from flashdrive_node.evaluation.report_page import summary_lines, write_report
    from flashdrive_node.ros.player import PlayOptions
    from flashdrive_node.ros.replay import replay
    from flashdrive_node.ros.session import SessionError, SessionOptions
    from flashdrive_node.runtime.bag import BagError
    from flashdrive_node.runtime.rig import RigError, load_rig

    bag = bundled_drive() if str(args.bag) == BUNDLED else args.bag
    with tempfile.TemporaryDirectory(prefix="flashdrive_replay_") as scratch:
        folder = args.report or Path(scratch)
        outputs = args.record or Path(scratch) / "outputs"
        try:
            rig = load_rig(args.rig)
            folder.mkdir(parents=True, exist_ok=True)
            play = PlayOptions(
                bag=bag,
                rig=args.rig,
                rate=args.rate,
                loop=args.loop,
                start_offset_s=args.start_offset,
                duration_s=args.duration,
            )
            session = SessionOptions(
                rig=args.rig, folder=folder, params_file=args.params, parameters=node_parameters(args)
            )
            result = replay(play, session, outputs, args.load_timeout, args.quiet)
            report = make_report(bag, result.outputs, rig, dataclasses.asdict(result.played), result.problem)
        except (BagError, RigError, SessionError, FileExistsError, ValueError) as error:
            print(f"flashdrive replay: {error}", file=sys.stderr)
            return 2
        print("\n".join(summary_lines(report)))
        if args.report is not None:
            for path in write_report(report, rig, args.report).values():
                print(f"wrote        {path}")
        if args.record is not None and result.outputs is not None:
            print(f"recorded     {result.outputs} (play it with: ros2 bag play {result.outputs})")
    if result.interrupted:
        return 130
    if report.problem or report.published == 0:
        print(f"flashdrive replay: {report.problem or 'nothing was published'}", file=sys.stderr)
        return 1
    return 0


def node_parameters(args: argparse.Namespace) -> dict[str, object]:
    """Node parameters that the command line asks for.

    Raises:
        ValueError: A ``--set`` without a value.
    """
    import yaml

    values: dict[str, object] = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, found {text!r}")
        values[name] = yaml.safe_load(value)
    if args.checkpoint is not None:
        values["checkpoint"] = args.checkpoint
    if args.engine is not None:
        values["engine"] = args.engine
    elif "engine" not in values and args.checkpoint is not None:
        values["engine"] = "plain"
    elif "engine" not in values and args.params is None:
        values["engine"] = "fake"
    return values
