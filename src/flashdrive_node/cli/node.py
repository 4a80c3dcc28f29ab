"""``flashdrive node``: the ROS 2 node, with ROS arguments passed through."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything behind ``node`` goes to ROS."""
    parser.add_argument(
        "ros_arguments",
        nargs=argparse.REMAINDER,
        metavar="--ros-args ...",
        help="parameters and remappings, for example: --ros-args -p engine:=fake -p auto_activate:=true",
    )


def run(args: argparse.Namespace) -> int:
    """Run the node until it is ended."""
    from flashdrive_node.ros.main import main

    return main(args.ros_arguments)
