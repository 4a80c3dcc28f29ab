"""The executable ``flashdrive_node``: start, spin, and end cleanly on SIGINT and SIGTERM."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions

from flashdrive_node import __version__
from flashdrive_node.ros.log import forward_logs
from flashdrive_node.ros.node import FlashdriveNode
from flashdrive_node.ros.parameters import ParameterError
from flashdrive_node.runtime.rig import RigError

_HELP = """\
usage: flashdrive_node [--help] [--version] [--ros-args ROS-ARGUMENTS]

Starts the driving node (ROS 2 lifecycle). Parameters and remappings are given as ROS arguments:
  flashdrive_node --ros-args --params-file params/flashdrive.yaml -p engine:=fake -p auto_activate:=true
Topics are under the node's name (~/input/..., ~/output/...); flashdrive.launch.py remaps them to a rig's topics.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the node until a signal or a shutdown transition ends it.

    Returns:
        0 after a signal, 2 where parameters or rig cannot be used.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given[: given.index("--ros-args")] if "--ros-args" in given else given
    if "--help" in own or "-h" in own:
        print(_HELP, end="")
        return 0
    if "--version" in own:
        print(f"flashdrive_node {__version__}")
        return 0
    # rclpy's handlers would take the context away under a running callback, and the clean-up could publish nothing.
    # The node's watch timer wakes the executor often enough for a Python handler; a second Ctrl-C (the terminal sends
    # one, launch another) changes nothing.
    ended: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: ended.append(received))
    rclpy.init(args=["flashdrive_node", *given], signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = FlashdriveNode()
    except (ParameterError, RigError) as error:
        print("flashdrive_node cannot start:", *error.problems, sep="\n  - ", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    logs = forward_logs(node.get_logger())
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        if node.get_parameter("auto_activate").value and node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            node.trigger_activate()
        while not ended and rclpy.ok():
            executor.spin_once()
    except ExternalShutdownException:
        pass
    finally:
        node.close()
        logging.getLogger("flashdrive_node").removeHandler(logs)
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
