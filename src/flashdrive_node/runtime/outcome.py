"""What the engine's worker tells the others: what became of an observation, and how it is itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashdrive_node.engine.protocol import EngineInfo, Observation, Prediction

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
    #: Numbers of outcomes by kind, of engine loads, of steps started and of frames taken ahead of their window.
    counts: dict[str, int]
    consecutive_failures: int
    last_error: str
