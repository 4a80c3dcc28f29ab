"""The node as a process of its own, started, brought up, watched and ended by another program.

Used by the commands that run the whole node: ``replay``, ``demo`` and ``benchmark-node``. Everything of one session
lives in one ROS domain that only this machine can see.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile

from flashdrive_node.ros.topics import NODE_NAME
from flashdrive_node.runtime.rig import load_rig, rig_remappings, share_directory

DDS_PROFILE = "fastdds_shared_memory.xml"
_TAIL_LINES = 15
_DISCOVERY_S = 0.4


class SessionError(Exception):
    """The node could not be started or brought up, or it ended; carries the end of its log."""


@dataclass(frozen=True)
class SessionOptions:
    """What to start, and where."""

    #: Name or path of the camera rig; its topics are remapped to the node's inputs.
    rig: str
    #: Folder for logs; must exist.
    folder: Path
    params_file: Path | None = None
    #: Parameters by ROS name, over those of the file.
    parameters: Mapping[str, object] = field(default_factory=dict)
    use_sim_time: bool = True
    domain_id: int = field(default_factory=lambda: own_domain_id())


def own_domain_id() -> int:
    """``ROS_DOMAIN_ID`` where it is set, else one that two sessions on one machine hardly share."""
    given = os.environ.get("ROS_DOMAIN_ID", "")
    return int(given) if given.isdecimal() else 1 + os.getpid() % 99


class Session:
    """Starts the node on entering and ends it on leaving; for the main thread of a program."""

    def __init__(self, options: SessionOptions):
        self.options = options
        self.log = options.folder / "node.log"
        #: Latest status by name, without the node's own name in front.
        self.diagnostics: dict[str, DiagnosticStatus] = {}
        self.diagnostics_received = 0
        self._children: list[subprocess.Popen[str]] = []
        self._environment = _environment(options)

    def __enter__(self) -> Self:
        # The end of this program by SIGTERM must end its children too.
        self._on_sigterm = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        # A job of a script inherits an ignored SIGINT; it must end by one all the same, and so must its children.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # Discovery reads these when the context is made, so they must also hold for this process.
        os.environ.update({k: self._environment[k] for k in ("ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_LOG_DIR")})
        self._context = Context()
        rclpy.init(args=[], context=self._context, domain_id=self.options.domain_id)
        self.control = Node(
            "flashdrive_session", context=self._context, enable_rosout=False, start_parameter_services=False
        )
        self.control.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, QoSProfile(depth=50))
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.control)
        self._change = self.control.create_client(ChangeState, f"/{NODE_NAME}/change_state")
        self._refuse_company()
        self.node = self.spawn("flashdrive_node.ros.main", self._node_arguments(), self.log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self._children):
            end_process(child)
        self._leave()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def spawn(
        self, module: str, arguments: Sequence[str], log: Path | None = None, sends_images: bool = False
    ) -> subprocess.Popen[str]:
        """Start a module of this package as a process in the session's ROS domain.

        Args:
            module: Run with ``python -m``.
            arguments: Its command line.
            log: File for stdout and stderr; None gives a pipe for stdout and this process's stderr.
            sends_images: Give it a shared-memory segment that holds a burst of all cameras.
        """
        environment = dict(self._environment)
        if sends_images:
            profile = share_directory() / "params" / DDS_PROFILE
            environment.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(profile))
        # Apart from the terminal: Ctrl-C reaches this program alone, which ends its children in order.
        with contextlib.ExitStack() as stack:
            out: Any = subprocess.PIPE if log is None else stack.enter_context(log.open("ab"))
            child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdout=out,
                stderr=None if log is None else subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def bring_up(self, timeout_s: float, on_text: Callable[[str], None] | None = None) -> None:
        """Configure, wait until the engine is ready, and activate.

        Raises:
            SessionError: A transition failed, the engine failed to load, or the time is over.
        """
        self.transition(Transition.TRANSITION_CONFIGURE, "configure", timeout_s)
        deadline = time.monotonic() + timeout_s
        said = ""
        while True:
            state, engine = self.engine_state()
            if state == "ready":
                break
            if state in ("loading", "warming") and engine.message != said:
                said = engine.message
                if on_text is not None:
                    on_text(said)
            if engine.level == DiagnosticStatus.ERROR:
                raise SessionError(f"the engine failed: {engine.message}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise SessionError(f"the engine was not ready after {timeout_s:.0f} s ({said})\n{self.log_tail()}")
            self.spin(0.05)
        self.transition(Transition.TRANSITION_ACTIVATE, "activate", timeout_s)

    def transition(self, number: int, name: str, timeout_s: float) -> None:
        """Ask the node for a lifecycle transition.

        Raises:
            SessionError: The node is not there or refuses.
        """
        deadline = time.monotonic() + timeout_s
        while not self._change.service_is_ready():
            self.spin(0.05)
            if time.monotonic() > deadline:
                raise SessionError(f"the node did not appear within {timeout_s:.0f} s\n{self.log_tail()}")
        future = self._change.call_async(ChangeState.Request(transition=Transition(id=number)))
        while not future.done():
            self.spin(0.02)
            if time.monotonic() > deadline:
                raise SessionError(f"the node did not answer '{name}' within {timeout_s:.0f} s\n{self.log_tail()}")
        answer = future.result()
        if answer is None or not answer.success:
            raise SessionError(f"the node refused to {name}\n{self.log_tail()}")

    def spin(self, seconds: float) -> None:
        """Serve this side of the session for a while.

        Raises:
            SessionError: The node has ended.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)
        if self.node.poll() is not None:
            raise SessionError(f"the node ended with exit code {self.node.returncode}\n{self.log_tail()}")

    def engine_state(self) -> tuple[str, DiagnosticStatus]:
        """State of the engine as the node last reported it ("" before that), and the whole report."""
        engine = self.diagnostics.get("engine", DiagnosticStatus())
        return next((item.value for item in engine.values if item.key == "state"), ""), engine

    def wait_until_idle(self, timeout_s: float) -> None:
        """Wait until the engine has nothing left to compute; returns silently when the time is over."""
        deadline = time.monotonic() + timeout_s
        self.wait_for_diagnostics(1, min(timeout_s, 3.0))
        while self.engine_state()[0] == "busy" and time.monotonic() < deadline:
            self.wait_for_diagnostics(1, 3.0)

    def wait_for_diagnostics(self, count: int, timeout_s: float) -> None:
        """Wait until the node has reported that many times more; returns silently when the time is over."""
        wanted, deadline = self.diagnostics_received + count, time.monotonic() + timeout_s
        while self.diagnostics_received < wanted and time.monotonic() < deadline:
            self.spin(0.05)

    def log_tail(self) -> str:
        """The last lines of the node's log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(["end of the node's log:", *(f"  {line}" for line in lines[-_TAIL_LINES:])])

    def _refuse_company(self) -> None:
        """Two nodes of one name in one domain would take each other's requests."""
        end = time.monotonic() + _DISCOVERY_S
        while time.monotonic() < end:
            self._executor.spin_once(timeout_sec=0.05)
            if self._change.service_is_ready():
                self._leave()
                raise SessionError(
                    f"a {NODE_NAME} is already running in ROS domain {self.options.domain_id}; "
                    "set ROS_DOMAIN_ID to a free one"
                )

    def _leave(self) -> None:
        self._executor.shutdown(timeout_sec=1.0)
        self.control.destroy_node()
        self._context.try_shutdown()

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            name = status.name.split(":", 1)[-1].strip()
            self.diagnostics[name] = status
        self.diagnostics_received += 1

    def _node_arguments(self) -> list[str]:
        options = self.options
        arguments = ["--ros-args"]
        if options.params_file is not None:
            arguments += ["--params-file", str(options.params_file)]
        for old, new in rig_remappings(load_rig(options.rig)):
            arguments += ["-r", f"{old}:={new}"]
        values = {"use_sim_time": options.use_sim_time, "rig": options.rig, **options.parameters}
        for name, value in values.items():
            arguments += ["-p", f"{name}:={_yaml(value)}"]
        return arguments


def end_process(child: subprocess.Popen[str], timeout_s: float = 10.0) -> int:
    """Ask a process to end with SIGINT, then SIGTERM, then kill it; returns its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            break
        child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout_s)
    if child.stdout is not None:
        child.stdout.close()
    return child.wait()


def _environment(options: SessionOptions) -> dict[str, str]:
    environment = dict(os.environ)
    environment["ROS_DOMAIN_ID"] = str(options.domain_id)
    environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    environment.setdefault("ROS_LOG_DIR", str(options.folder / "ros_log"))
    # Threads of a computation on the CPU that wait for each other would otherwise do so at full load, and take the
    # cores from the player and the decoding: five times the time for a window on two busy cores.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def _yaml(value: object) -> str:
    # JSON is YAML; text is quoted, so that a checkpoint named "12" stays text.
    return json.dumps(str(value) if isinstance(value, Path) else value)
