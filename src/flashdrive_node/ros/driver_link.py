"""The driving node as a world sees it: what it publishes, what it says about itself, and whether it is still there."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_msgs.msg import String
from std_srvs.srv import Trigger

from flashdrive_node.ros import topics
from flashdrive_node.ros.messages import stamp_ns, trajectory_type
from flashdrive_node.ros.published_plan import PlanError, PublishedPlan, read_plan

#: States of the inference in which no answer comes, however long one waits.
_HOPELESS = ("unconfigured", "configure failed", "inactive", "paused", "engine failed", "no window")
#: States in which it forms no windows yet.
_NOT_ACTIVE = ("unconfigured", "inactive", "loading")
#: A hopeless state must last so long: the one before a window may still be on its way.
_HOPELESS_S = 1.0
_POLL_S = 0.02
#: Largest difference between the node's clock and /clock where that stands still, nanoseconds.
_CLOCK_NS = 50_000_000


class DriverError(Exception):
    """The driving node is not there, does not become ready, or has gone; says what it last said about itself."""


@dataclass(frozen=True)
class Report:
    """What the node last said about itself."""

    #: ``time.monotonic()`` when it came, and the node's clock when it was made.
    received_s: float
    stamp_ns: int
    #: State of the inference ("running", "withheld", ...) and the whole message.
    state: str
    text: str
    #: Windows formed since it was configured.
    windows: int
    #: State of the engine: "loading", "ready", "busy", ...
    engine: str

    def is_at(self, time_ns: int) -> bool:
        """Whether the node's clock stood at a time, but for rounding."""
        return abs(self.stamp_ns - time_ns) < _CLOCK_NS


@dataclass(frozen=True)
class Answer:
    """What came of one window."""

    #: None where the node published nothing.
    plan: PublishedPlan | None
    #: ``~/output/record`` of the window.
    record: dict[str, Any] | None = None
    #: Why there is no plan, or no newer one.
    problem: str = ""
    #: The node did not even say that there will be none.
    timed_out: bool = False


class DriverLink:
    """Listens to one driving node in a thread of its own.

    Args:
        node: Makes the subscriptions; spun by this class alone.
        name: Of the driving node, with its namespace: "/flashdrive_node".
        silence_s: Without diagnostics for so long the node counts as gone.
    """

    def __init__(self, node: Node, name: str, silence_s: float):
        self.name = name
        self._silence_s = silence_s
        self._prefix = f"{name.lstrip('/')}: "
        self._changed = Condition()
        self._plans: dict[int, PublishedPlan | PlanError] = {}
        self._records: dict[int, dict[str, Any]] = {}
        self._reports: deque[Report] = deque(maxlen=8)
        self._failure: Exception | None = None
        #: Windows that are known to have come to an end.
        self._windows_ended = 0
        trajectory, record, reset = (
            topic.replace("~", name, 1) for topic in (topics.TRAJECTORY, topics.RECORD, topics.RESET)
        )
        self._outputs = (
            node.create_subscription(trajectory_type(), trajectory, self._on_trajectory, QoSProfile(depth=20)),
            node.create_subscription(String, record, self._on_record, QoSProfile(depth=20)),
        )
        node.create_subscription(DiagnosticArray, topics.DIAGNOSTICS, self._on_diagnostics, QoSProfile(depth=50))
        self._reset = node.create_client(Trigger, reset)
        self._executor = SingleThreadedExecutor(context=node.context)
        self._executor.add_node(node)
        self._thread = Thread(target=self._spin, name="driver_link", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._executor.shutdown(timeout_sec=1.0)
        self._thread.join(2.0)

    @property
    def report(self) -> Report | None:
        """The newest report."""
        return self._reports[-1] if self._reports else None

    def wait_until_ready(self, timeout_s: float, meanwhile: Callable[[], None]) -> None:
        """Wait until the node is active and its engine is ready.

        Args:
            timeout_s: The longest wait.
            meanwhile: Called again and again.

        Raises:
            DriverError: It is not, or its engine or its configuration failed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            meanwhile()
            report = self.report
            if report is not None:
                if report.state in ("configure failed", "engine failed"):
                    raise DriverError(f"{self.name}: {report.text}")
                active = report.engine in ("ready", "busy") and report.state not in _NOT_ACTIVE
                if active and self._is_connected():
                    return
            if time.monotonic() > deadline:
                raise DriverError(f"{self.name} was not ready within {timeout_s:g} s: {self._said()}")
            time.sleep(0.05)

    def reset(self, now_ns: int, timeout_s: float = 10.0) -> None:
        """Have the node start its stream anew, and forget what it published before.

        Args:
            now_ns: What /clock says; returns when the node knows that, because a jump of its clock resets it again.
            timeout_s: The longest wait.

        Raises:
            DriverError: It refuses, gives no answer, has another clock, or has gone.
        """
        deadline = time.monotonic() + timeout_s
        future = self._reset.call_async(Trigger.Request())
        while not future.done():
            self._wait(deadline, f"did not answer {topics.RESET} within {timeout_s:g} s")
        answer = future.result()
        if answer is None or not answer.success:
            raise DriverError(f"{self.name} refused {topics.RESET}: {answer.message if answer else 'no answer'}")
        since_s = time.monotonic()
        while (report := self.report) is None or report.received_s < since_s or not report.is_at(now_ns):
            found = f"{report.stamp_ns / 1e9:.3f} s" if report is not None else "none"
            self._wait(deadline, f"must have the clock of /clock, {now_ns / 1e9:.3f} s (use_sim_time), found {found}")
        with self._changed:
            self._plans.clear()
            self._records.clear()
            self._windows_ended = report.windows

    def _wait(self, deadline_s: float, problem: str) -> None:
        self._check_alive()
        if time.monotonic() > deadline_s:
            raise DriverError(f"{self.name} {problem}; {self._said()}")
        time.sleep(_POLL_S / 4)

    def answer(self, t0_ns: int, timeout_s: float) -> Answer:
        """Wait for what comes of the window that ends at t0.

        Raises:
            DriverError: The node has gone.
        """
        began_s = time.monotonic()
        with self._changed:
            while True:
                plan, record = self._plans.get(t0_ns), self._records.get(t0_ns)
                if plan is not None and record is not None:
                    self._windows_ended = record["window_id"]
                    return Answer(None, record, str(plan)) if isinstance(plan, PlanError) else Answer(plan, record)
                if problem := self._given_up(began_s):
                    return Answer(None, None, problem)
                if time.monotonic() - began_s > timeout_s:
                    text = f"no answer within {timeout_s:g} s: {self._said()}"
                    return Answer(None, None, text, timed_out=True)
                self._check_alive()
                self._changed.wait(_POLL_S)

    def newest(self, since_ns: int) -> Answer:
        """The newest window with t0 not before a time that there is a trajectory of.

        Raises:
            DriverError: The node has gone.
        """
        with self._changed:
            self._check_alive()
            said = self.report.text if self.report is not None else ""
            plans = [p for t, p in self._plans.items() if t >= since_ns and isinstance(p, PublishedPlan)]
            if not plans:
                return Answer(None, problem=said)
            plan = max(plans, key=lambda p: p.t0_ns)
            return Answer(plan, self._records.get(plan.t0_ns), said)

    def _given_up(self, began_s: float) -> str:
        """Why no answer will come, where two reports in a row since then say so; else ""."""
        recent = [report for report in self._reports if report.received_s > began_s][-2:]
        if len(recent) < 2:
            return ""
        # The engine has nothing to do and every window has ended: this one was not published. One report alone may
        # overtake the trajectory.
        if all(report.engine == "ready" and report.windows > self._windows_ended for report in recent):
            self._windows_ended = recent[-1].windows
            return recent[-1].text
        # While the engine computes, the cameras of a world that waits are silent, and the node says so.
        hopeless = all(report.state in _HOPELESS and report.engine != "busy" for report in recent)
        return recent[-1].text if hopeless and time.monotonic() - began_s > _HOPELESS_S else ""

    def _is_connected(self) -> bool:
        return self._reset.service_is_ready() and all(output.get_publisher_count() for output in self._outputs)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise DriverError(f"what {self.name} publishes cannot be read: {self._failure!r}") from self._failure
        report = self.report
        silent_s = time.monotonic() - report.received_s if report is not None else float("inf")
        if silent_s > self._silence_s:
            raise DriverError(f"{self.name} has gone: no diagnostics for {silent_s:.1f} s; {self._said()}")
        if not self._reset.service_is_ready():
            raise DriverError(f"{self.name} has gone: its services are not there any more; {self._said()}")

    def _said(self) -> str:
        report = self.report
        if report is None:
            return f"it has published nothing on {topics.DIAGNOSTICS}"
        return f"it last said '{report.text}', engine {report.engine or 'unknown'}"

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass
        except Exception as error:  # whatever a message makes a callback raise; the thread that drives reports it
            self._failure = error

    def _on_trajectory(self, message: Any) -> None:
        plan: PublishedPlan | PlanError
        try:
            plan = read_plan(message)
        except PlanError as error:
            plan = error
        with self._changed:
            self._plans[stamp_ns(message.header.stamp)] = plan
            self._changed.notify_all()

    def _on_record(self, message: String) -> None:
        record = json.loads(message.data)
        with self._changed:
            self._records[record["t0_ns"]] = record
            self._changed.notify_all()

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        parts = {s.name.removeprefix(self._prefix): s for s in message.status if s.name.startswith(self._prefix)}
        inference = parts.get("inference")
        if inference is None:
            return
        said, engine = _values(inference), _values(parts.get("engine", DiagnosticStatus()))
        report = Report(
            received_s=time.monotonic(),
            stamp_ns=stamp_ns(message.header.stamp),
            state=said.get("state", ""),
            text=inference.message,
            windows=int(said.get("windows", 0)),
            engine=engine.get("state", ""),
        )
        with self._changed:
            self._reports.append(report)
            self._changed.notify_all()


def _values(status: DiagnosticStatus) -> dict[str, str]:
    return {item.key: item.value for item in status.values}
