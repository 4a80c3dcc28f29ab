"""The real node as a process of its own, and one ROS participant of the test to talk with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import rclpy
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter

#: Value of the parameter ``fake.probe`` with which records say which painted frames the engine saw.
PAINTED_PROBE = "support.painted_probe:painted_metrics"

TRANSITIONS = {
    "configure": Transition.TRANSITION_CONFIGURE,
    "activate": Transition.TRANSITION_ACTIVATE,
    "deactivate": Transition.TRANSITION_DEACTIVATE,
    "cleanup": Transition.TRANSITION_CLEANUP,
}
#: What `shutdown` is called depends on the state that it starts from.
SHUTDOWNS = {
    State.PRIMARY_STATE_UNCONFIGURED: Transition.TRANSITION_UNCONFIGURED_SHUTDOWN,
    State.PRIMARY_STATE_INACTIVE: Transition.TRANSITION_INACTIVE_SHUTDOWN,
    State.PRIMARY_STATE_ACTIVE: Transition.TRANSITION_ACTIVE_SHUTDOWN,
}


def own_domain_id() -> int:
    """A domain of this test process's own, so that runs beside each other on one machine do not meet."""
    return 3 + os.getpid() % 95


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str, context: Callable[[], str] = str) -> Any:
    """The first true value of ``condition``.

    Raises:
        TimeoutError: Says what was waited for, and ``context()``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}\n{context()}")
        time.sleep(0.01)


class Bench:
    """The test's own ROS participant: a context, a node and a thread that spins it."""

    def __init__(self, domain_id: int, name: str = "bench"):
        self.domain_id = domain_id
        # As camera drivers are to be started: a killed reader's share of large pictures exhausts the default segment.
        profile = Path(__file__).parents[2] / "params" / "fastdds_shared_memory.xml"
        os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(profile))
        self.context = Context()
        rclpy.init(context=self.context, domain_id=domain_id)
        self.node = Node(name, context=self.context, start_parameter_services=False, enable_rosout=False)
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, name=f"{name}_spin", daemon=True)
        self._thread.start()
        self._clients: dict[str, Any] = {}

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._executor.spin()

    def call(self, kind: Any, name: str, request: Any, timeout_s: float = 10.0) -> Any:
        """The answer of a service; waits until the service is there."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = self.node.create_client(kind, name)
        if not client.wait_for_service(timeout_s):
            raise TimeoutError(f"service {name} is not there after {timeout_s:g} s")
        done = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: done.set())
        if not done.wait(timeout_s):
            client.remove_pending_request(future)
            raise TimeoutError(f"service {name} gave no answer within {timeout_s:g} s")
        return future.result()

    def close(self) -> None:
        """Stop spinning and leave the domain."""
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)
        self.node.destroy_node()
        self.context.try_shutdown()


class NodeProcess:
    """``flashdrive_node`` in a process of its own; its output goes to ``log``."""

    def __init__(
        self,
        bench: Bench,
        folder: Path,
        parameters: Mapping[str, object],
        remappings: Sequence[tuple[str, str]] = (),
        namespace: str = "/",
        name: str = "flashdrive_node",
        extra_arguments: Sequence[str] = (),
    ):
        self.bench = bench
        self.namespace = namespace
        self.full_name = f"{namespace.rstrip('/')}/{name}"
        self.log = folder / f"{self.full_name.strip('/').replace('/', '.')}.log"
        self.process: subprocess.Popen[bytes] | None = None
        executable = str(Path(sys.executable).with_name("flashdrive_node"))
        arguments = ["--ros-args", "-r", f"__ns:={namespace}", "--log-level", "info"]
        for key, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            arguments += ["-p", f"{key}:={text}"]
        for old, new in remappings:
            arguments += ["-r", f"{old}:={new}"]
        self.command = [executable, *arguments, *extra_arguments]
        self.environment = os.environ | {
            "ROS_DOMAIN_ID": str(bench.domain_id),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
            "ROS_LOG_DIR": str(folder / "ros_log"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RCUTILS_LOGGING_USE_STDOUT": "1",
        }

    def __enter__(self) -> NodeProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def start(self) -> None:
        """Start the process. A second call after an exit starts it again."""
        with self.log.open("ab") as log:
            # Its own session, so that a Ctrl-C at the test's terminal reaches the node through the test only.
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """Process id of the running node."""
        assert self.process is not None
        return self.process.pid

    @property
    def output(self) -> str:
        """Everything that the node wrote to stdout and stderr."""
        return self.log.read_text(errors="replace")

    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def usage(self) -> psutil.Process:
        """Handle to measure memory, threads and descriptors."""
        return psutil.Process(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Deliver a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 15.0) -> int:
        """Exit code; kills the process and raises where it does not end by itself."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise TimeoutError(f"the node did not exit within {timeout_s:g} s\n{self.output[-3000:]}") from None

    def stop(self) -> int:
        """SIGINT, then the exit code."""
        self.send(signal.SIGINT)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: no chance to clean up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def state(self) -> str:
        """Label of the lifecycle state."""
        return self.bench.call(GetState, f"{self.full_name}/get_state", GetState.Request()).current_state.label

    def change(self, transition: str, timeout_s: float = 15.0) -> bool:
        """Request ``configure``, ``activate``, ``deactivate``, ``cleanup`` or ``shutdown``: whether it was done."""
        if transition == "shutdown":
            found = self.bench.call(GetState, f"{self.full_name}/get_state", GetState.Request()).current_state.id
            number = SHUTDOWNS[found]
        else:
            number = TRANSITIONS[transition]
        request = ChangeState.Request(transition=Transition(id=number))
        return self.bench.call(ChangeState, f"{self.full_name}/change_state", request, timeout_s).success

    def set_parameters(self, **values: object) -> list[str]:
        """Set parameters (``__`` in a name stands for a dot); the reason of every refused one."""
        request = SetParameters.Request(
            parameters=[
                Parameter(name.replace("__", "."), value=value).to_parameter_msg() for name, value in values.items()
            ]
        )
        results = self.bench.call(SetParameters, f"{self.full_name}/set_parameters", request).results
        return [result.reason for result in results if not result.successful]
