"""The ``flashdrive`` command.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``. Only the module of the chosen
subcommand is imported, so what needs no ROS runs without it. A module with an argument ``ros_arguments`` (a list) gets
everything from ``--ros-args`` on in it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from flashdrive_node import __version__

#: Subcommand to its module and one line of help.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "run the whole node on a bundled drive and write a video, a rosbag and a report"),
    "inspect": ("inspect", "show what a checkpoint is, what it needs in memory, and what is wrong with it"),
    "parity": ("parity", "compare this implementation with recordings of the reference, stage by stage"),
    "evaluate": ("evaluate", "accuracy in open loop over recordings, worlds or PhysicalAI clips, with intervals"),
    "ablate": ("ablate", "what each shortcut of the streaming engine costs in accuracy and gains in time"),
    "benchmark": ("benchmark", "time every stage of the model on this machine"),
    "schedule": ("schedule", "find the flow steps that are worth an evaluation, on windows of a checkpoint's use"),
    "benchmark-kernels": ("benchmark_kernels", "time the engine's own kernels beside PyTorch's on this GPU"),
    "benchmark-node": ("benchmark_node", "measure what the node costs around the engine, over real DDS"),
    "world": ("world", "draw the procedural driving world, and check the expert that drives in it"),
    "drive": ("drive", "let a checkpoint drive in the procedural world, and score it beside baselines"),
    "train": ("train", "train the small model in the procedural world"),
    "quantize": ("quantize", "write a checkpoint's text layers in 4 bits, calibrated on windows of its use"),
    "node": ("node", "start the ROS 2 driving node"),
    "replay": ("replay", "play a rosbag through the node, record what it publishes, and summarise the run"),
}

_EPILOG = """\
Start here:
  flashdrive demo --out out/demo            see the whole thing run, without a GPU or a download
  flashdrive inspect CHECKPOINT             before loading 22 GB: is the checkpoint whole, does it fit?
  flashdrive COMMAND --help                 what a command takes

Expected errors (a file that is not there, a checkpoint that does not fit) end with one message and exit code 2;
--debug shows where they come from.
"""

#: Optional packages: what to do when a command misses one.
_MISSING = {
    "rclpy": "source ROS 2 Jazzy (source /opt/ros/jazzy/setup.bash), or pip install 'flashdrive_node[ros]'",
    "rosbags": "pip install 'flashdrive_node[tools]'",
    "physical_ai_av": "pip install 'flashdrive_node[physical_ai]'",
    "matplotlib": "pip install 'flashdrive_node[tools]'",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0, what the command returns, 2 on expected errors, 130 on Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        args = _parse(arguments)
        logging.basicConfig(
            level=logging.DEBUG if debug else logging.INFO,
            stream=sys.stderr,
            format="%(levelname)s %(name)s: %(message)s",
        )
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if debug or package not in _MISSING:
            raise
        print(f"flashdrive: this command needs the package {package!r}: {_MISSING[package]}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug or not _expected(error):
            raise
        print(f"flashdrive: {error}", file=sys.stderr)
        return 2


def _expected(error: Exception) -> bool:
    """Whether the message of this error is all that a user needs."""
    from flashdrive_node.engine.protocol import EngineError
    from flashdrive_node.model.errors import ModelError

    return isinstance(error, ModelError | EngineError | OSError)


def _parse(arguments: list[str]) -> argparse.Namespace:
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="log more, and show the traceback of any error"
    )
    parser = argparse.ArgumentParser(
        prog="flashdrive",
        description="Real-time driving with the Alpamayo 1.5 / R1 models: the ROS 2 node and its tools.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[debug],
    )
    parser.add_argument("--version", action="version", version=f"flashdrive_node {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module_name, text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[debug],
        )
        if name == chosen:
            module = importlib.import_module(f"flashdrive_node.cli.{module_name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    # argparse would take what follows --ros-args, which has a syntax of its own, for options.
    cut = arguments.index("--ros-args") if "--ros-args" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    if arguments[cut:]:
        if not hasattr(args, "ros_arguments"):
            parser.error(f"{chosen} takes no --ros-args")
        args.ros_arguments = [*args.ros_arguments, *arguments[cut:]]
    return args


if __name__ == "__main__":
    sys.exit(main())
