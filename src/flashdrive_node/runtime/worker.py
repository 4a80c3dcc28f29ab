"""The one thread that owns the engine: a queue of one, latest wins, and everything ends in exactly one outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flashdrive_node.engine.protocol import Engine, EngineInfo, Observation, Prediction

State = Literal["idle", "loading", "warming", "ready", "busy", "failed", "closed"]
#: result: a prediction. superseded: a newer observation took its place before it started. discarded: it was finished
#: or waiting when a reset came. failed: the engine raised. closed: the worker ended first.
OutcomeKind = Literal["result", "superseded", "discarded", "failed", "closed"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one submitted observation; every one of them ends in exactly one outcome."""

    kind: OutcomeKind
    observation: Observation
    prediction: Prediction | None
    #: Why, for every kind but "result".
    text: str
    #: ``time.monotonic_ns()`` at submission, at the start of the step and at its end; 0 where it never started.
    submitted_ns: int
    started_ns: int
    finished_ns: int


@dataclass(frozen=True)
class WorkerStatus:
    """Snapshot for diagnostics."""

    state: State
    #: A step runs longer than the hang timeout; then ``step_s`` says how long.
    hanging: bool
    step_s: float
    #: Progress of loading, 0 to 1, and what is being done or what failed.
    progress: float
    text: str
    info: EngineInfo | None
    #: Numbers of outcomes by kind, of engine loads and of steps started.
    counts: dict[str, int]
    consecutive_failures: int
    last_error: str


class EngineWorker:
    """Runs an engine in a thread of its own.

    Callbacks are called from the worker thread (superseded outcomes: from the submitting one); they must be quick.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        on_outcome: Callable[[Outcome], None],
        on_state: Callable[[State], None] | None = None,
        hang_timeout_s: float = 5.0,
        reload_after_failures: int = 3,
    ):
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread: load, warm up, then wait for observations. Returns at once."""
        raise NotImplementedError

    def submit(self, observation: Observation) -> bool:
        """Queue an observation in place of the waiting one; False (and no outcome) where the worker is not ready."""
        raise NotImplementedError

    def reset(self, reason: str) -> None:
        """Discard what is queued or running and have the engine forget its streaming state before the next step."""
        raise NotImplementedError

    def status(self) -> WorkerStatus:
        """Current snapshot; never blocks on a running step."""
        raise NotImplementedError

    def close(self, timeout_s: float = 10.0) -> bool:
        """End the thread after the running step and close the engine; False where it did not end in time."""
        raise NotImplementedError
