"""/clock of a world: told step by step, or running with the wall clock."""

from __future__ import annotations

import contextlib
import time
from threading import Event, Lock, Thread

from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock

from flashdrive_node.ros.messages import stamp_message

#: Time between two messages of the running clock, seconds.
_PERIOD_S = 0.01


class WorldClock:
    """Simulated time, which never goes back.

    ``tell`` moves it by hand. ``run_to`` lets it run with the wall clock up to a time, where it stands until it is
    told to run further: a world that is late stretches time and never skips any.
    """

    def __init__(self, node: Node):
        self._publisher = node.create_publisher(Clock, "/clock", QoSProfile(depth=10))
        self._lock = Lock()
        self._now_ns = 0
        #: Wall time (monotonic) minus simulated time, nanoseconds, while it runs; and where it stops.
        self._offset_ns = 0
        self._limit_ns = 0
        self._ended = Event()
        self._thread: Thread | None = None

    @property
    def now_ns(self) -> int:
        """The time that was last told."""
        return self._now_ns

    def tell(self, now_ns: int) -> None:
        """Set the time, unless that would be back."""
        with self._lock:
            self._now_ns = max(self._now_ns, now_ns)
            self._publish()

    def run_to(self, limit_ns: int) -> float:
        """Wait until the running time has come to where it may run to, and let it run on to a new limit.

        Returns:
            How late this call was: seconds of the wall clock by which time was stretched.
        """
        with self._lock:
            wall_ns = time.monotonic_ns()
            if self._thread is None:
                self._offset_ns, self._limit_ns = wall_ns - self._now_ns, self._now_ns
                self._thread = Thread(target=self._run, name="world_clock", daemon=True)
                self._thread.start()
            due_ns = self._offset_ns + self._limit_ns
        time.sleep(max(0, due_ns - wall_ns) / 1e9)
        with self._lock:
            late_ns = max(0, time.monotonic_ns() - due_ns)
            # Waking up takes its time as well; only what is more than that stretches the clock.
            late_ns = late_ns if late_ns > _PERIOD_S * 1e9 else 0
            self._offset_ns += late_ns
            self._now_ns = self._limit_ns
            self._limit_ns = limit_ns
            self._publish()
        return late_ns / 1e9

    def close(self) -> None:
        """Stop the running clock."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _run(self) -> None:
        # The context may go first where the process is interrupted; RuntimeError is rclpy's RCLError.
        with contextlib.suppress(InvalidHandle, RuntimeError):
            while not self._ended.wait(_PERIOD_S):
                with self._lock:
                    wall_ns = time.monotonic_ns() - self._offset_ns
                    self._now_ns = max(self._now_ns, min(wall_ns, self._limit_ns))
                    self._publish()

    def _publish(self) -> None:
        self._publisher.publish(Clock(clock=stamp_message(self._now_ns)))
