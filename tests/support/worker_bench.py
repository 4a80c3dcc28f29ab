"""A worker with an engine that notes its calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from flashdrive_node.engine.fake import FakeEngine, FakeSettings
from flashdrive_node.engine.protocol import EngineError, EngineInfo, Observation, Prediction, Progress
from flashdrive_node.runtime.outcome import Outcome, State
from flashdrive_node.runtime.worker import EngineWorker


def observation(window_id: int) -> Observation:
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = np.arange(-15, 1) * 0.5
    return Observation(window_id, window_id, (), xyz, np.tile(np.eye(3, dtype=np.float32), (16, 1, 1)))


class Engine(FakeEngine):
    """The fake engine with a log of its calls and the thread that made them, and programmable failures."""

    def __init__(self, settings: FakeSettings | None = None):
        super().__init__(settings or FakeSettings(latency_s=0.0))
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.failing_loads = 0
        self.failing_reset = False

    def note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)

    def load(self, progress: Progress | None = None) -> EngineInfo:
        self.note("load")
        if self.failing_loads:
            self.failing_loads -= 1
            raise EngineError("no weights")
        return super().load(progress)

    def warm_up(self, progress: Progress | None = None) -> None:
        self.note("warm_up")
        super().warm_up(progress)

    def step(self, observation: Observation) -> Prediction:
        self.note(f"step {observation.window_id}")
        return super().step(observation)

    def reset(self, reason: str) -> None:
        self.note(f"reset {reason}")
        if self.failing_reset:
            raise RuntimeError("device lost")
        super().reset(reason)

    def close(self) -> None:
        self.note("close")
        super().close()


class Bench:
    """A worker with its engine, outcomes and states."""

    def __init__(self, engine: Engine | None = None, **arguments: float):
        self.engine = engine or Engine()
        self.outcomes: list[Outcome] = []
        self.states: list[State] = []
        self.worker = EngineWorker(
            lambda: self.engine,
            self.outcomes.append,
            self.states.append,
            **arguments,  # type: ignore[arg-type]
        )

    def start(self) -> Bench:
        self.worker.start()
        self.wait(lambda: self.worker.ready)
        return self

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, self.worker.status()
            time.sleep(0.001)

    def step(self, window_id: int) -> Outcome:
        """Submit and wait for the outcome."""
        before = len(self.outcomes)
        assert self.worker.submit(observation(window_id))
        self.wait(lambda: len(self.outcomes) > before)
        return self.outcomes[-1]

    def busy_with(self, window_id: int) -> None:
        """Submit to a hanging engine and wait until it hangs."""
        assert self.worker.submit(observation(window_id))
        self.wait(lambda: f"step {window_id}" in self.engine.calls)

    def kinds(self) -> list[tuple[int, str]]:
        return [(outcome.observation.window_id, outcome.kind) for outcome in self.outcomes]
