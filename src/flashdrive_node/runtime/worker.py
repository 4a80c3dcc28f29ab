"""The one thread that owns the engine: a queue of one, latest wins, and everything ends in exactly one outcome."""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.engine.protocol import Engine, EngineInfo, Observation, Prediction, TakesFramesAhead
from flashdrive_node.runtime.frames_ahead import FrameAhead, FramesAhead
from flashdrive_node.runtime.outcome import Outcome, OutcomeKind, State, WorkerStatus

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    observation: Observation
    epoch: int
    submitted_ns: int
    started_ns: int = 0


class EngineWorker:
    """Runs an engine in a thread of its own.

    ``on_outcome`` is called from the worker thread; outcomes of observations that never started come from the thread
    that caused them (``submit``, ``reset``). It must be quick and must not raise. An engine that raises is reset and
    used again; after ``reload_after_failures`` failures in a row, or at once where the weights are lost to a failed
    reload, it is closed and loaded again, with a pause that doubles from ``reload_pause_s`` to a minute.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        on_outcome: Callable[[Outcome], None],
        on_state: Callable[[State], None] | None = None,
        hang_timeout_s: float = 5.0,
        reload_after_failures: int = 3,
        reload_pause_s: float = 1.0,
    ):
        self._make_engine = make_engine
        self._on_outcome = on_outcome
        self._on_state = on_state
        self._hang_timeout_s = hang_timeout_s
        self._reload_after = reload_after_failures
        self._reload_pause_s = reload_pause_s
        self._wake = Condition()
        self._state: State = "idle"
        self._queued: _Job | None = None
        # What the engine is at since then, 0 for nothing: for the watch on hanging steps.
        self._busy_since_ns = 0
        self._ahead = FramesAhead()
        self._takes_frames = False
        self._epoch = 0
        self._pending_reset: str | None = None
        self._closing = False
        self._progress = (0.0, "")
        self._info: EngineInfo | None = None
        self._counts: Counter[str] = Counter()
        self._failures = 0
        self._last_error = ""
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread: load, warm up, then wait for observations. Returns at once."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether ``submit`` would queue."""
        return self._state in ("ready", "busy")

    def submit(self, observation: Observation) -> bool:
        """Queue an observation in place of the waiting one; False (and no outcome) where the worker is not ready."""
        with self._wake:
            if not self.ready or self._closing:
                return False
            replaced, self._queued = self._queued, _Job(observation, self._epoch, time.monotonic_ns())
            self._counts["submitted"] += 1
            self._ahead.expect(observation)
            self._wake.notify()
        if replaced is not None:
            self._finish(replaced, "superseded", text=f"window {observation.window_id} took its place")
        return True

    def ingest(self, camera_index: int, stamp_ns: int, image: NDArray[np.uint8]) -> bool:
        """Offer a decoded frame of the coming window, which the engine may take before the window is complete.

        It does so between two steps, and never while a window waits, which brings its frames itself.

        Args:
            camera_index: Of the frame's camera.
            stamp_ns: Header stamp.
            image: RGB, uint8 [height, width, 3], which nobody changes any more.

        Returns:
            False where the frame will come with its window alone: the engine takes none ahead, or a newer one was here.
        """
        with self._wake:
            if not self.ready or self._closing or not self._takes_frames:
                return False
            kept = self._ahead.add(FrameAhead(camera_index, stamp_ns, image, self._epoch))
            self._wake.notify()
        return kept

    def reset(self, reason: str) -> None:
        """Discard what is queued or running and have the engine forget its streaming state before the next step."""
        with self._wake:
            self._epoch += 1
            self._pending_reset = reason
            self._counts["resets"] += 1
            queued, self._queued = self._queued, None
            self._ahead.clear()
        if queued is not None:
            self._finish(queued, "discarded", text=f"reset: {reason}")

    def status(self) -> WorkerStatus:
        """Current snapshot; never blocks on a running step."""
        with self._wake:
            step_s = (time.monotonic_ns() - self._busy_since_ns) / 1e9 if self._busy_since_ns else 0.0
            return WorkerStatus(
                state=self._state,
                hanging=step_s > self._hang_timeout_s,
                step_s=step_s,
                progress=self._progress[0],
                text=self._progress[1],
                info=self._info,
                counts=dict(self._counts),
                consecutive_failures=self._failures,
                last_error=self._last_error,
            )

    def close(self, timeout_s: float = 10.0) -> bool:
        """End the thread after the running step and close the engine; False where it did not end in time."""
        with self._wake:
            self._closing = True
            queued, self._queued = self._queued, None
            self._wake.notify()
        if queued is not None:
            self._finish(queued, "closed", text="the worker was closed")
        if self._thread.ident is None:
            self._state = "closed"
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        engine: Engine | None = None
        try:
            engine = self._make_engine()
            self._load(engine)
        except Exception as error:
            # Nothing that waiting would mend: a wrong path, a broken file, no such device.
            self._fail("engine could not be loaded", error)
            with self._wake:
                self._wake.wait_for(lambda: self._closing)
        else:
            while (task := self._next_task()) is not None:
                if isinstance(task, _Job):
                    self._step(engine, task)
                else:
                    self._take_ahead(engine, task)
                if self._failures >= self._reload_after and not self._closing:
                    self._reload(engine)
        if engine is not None:
            try:
                engine.close()
            except Exception as error:
                self._fail("engine could not be closed", error)
        self._set_state("closed")

    def _load(self, engine: Engine) -> None:
        self._set_state("loading")
        with self._wake:
            self._counts["loads"] += 1
        self._info = engine.load(self._report)
        self._set_state("warming")
        engine.warm_up(self._report)
        self._failures = 0
        self._takes_frames = isinstance(engine, TakesFramesAhead)
        self._report(1.0, "ready")
        self._set_state("ready")

    def _reload(self, engine: Engine) -> None:
        pause_s = self._reload_pause_s
        while not self._closing:
            try:
                engine.close()
                _free_memory()
                self._load(engine)
                return
            except Exception as error:
                self._fail(f"engine could not be loaded again, next try in {pause_s:.0f} s", error)
            with self._wake:
                self._wake.wait_for(lambda: self._closing, timeout=pause_s)
            pause_s = min(2 * pause_s, 60.0)

    def _next_task(self) -> _Job | FrameAhead | None:
        """The waiting window, or else a frame of the next one; None at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._queued is not None or self._closing or self._ahead.pending())
            if self._closing:
                return None
            self._busy_since_ns = time.monotonic_ns()
            job, self._queued = self._queued, None
            if job is None:
                return self._ahead.pop()
            self._ahead.begin()
            job.started_ns = self._busy_since_ns
            self._counts["steps"] += 1
        self._set_state("busy")
        return job

    def _step(self, engine: Engine, job: _Job) -> None:
        prediction: Prediction | None = None
        text = ""
        with self._wake:
            # A reset that came since the job was taken must stay pending, or this window would enter the new stream.
            stale = job.epoch != self._epoch
            if stale:
                self._busy_since_ns = 0
                job.started_ns = 0
            else:
                reason, self._pending_reset = self._pending_reset, None
        if stale:
            self._set_state("ready")
            self._finish(job, "discarded", text="a reset overtook it")
            return
        try:
            if reason is not None:
                engine.reset(reason)
            prediction = engine.step(job.observation)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            # Ten tracebacks a second help nobody: the first of a series says it all.
            logger.warning(
                "window %d: the engine raised %s", job.observation.window_id, text, exc_info=not self._failures
            )
            self._recover(engine, error, text)
        with self._wake:
            self._busy_since_ns = 0
            overtaken = job.epoch != self._epoch
            if prediction is not None:
                self._failures = 0
        self._set_state("ready")
        if overtaken:
            self._finish(job, "discarded", text="a reset overtook it")
        elif prediction is None:
            self._finish(job, "failed", text=text)
        else:
            self._finish(job, "result", prediction)

    def _take_ahead(self, engine: Engine, frame: FrameAhead) -> None:
        with self._wake:
            stale = frame.epoch != self._epoch
            if not stale:
                reason, self._pending_reset = self._pending_reset, None
        try:
            if not stale:
                if reason is not None:
                    engine.reset(reason)
                assert isinstance(engine, TakesFramesAhead)
                engine.ingest(frame.camera_index, frame.stamp_ns, frame.image)
        except Exception as error:
            # The window with this frame will say what is wrong with it; here it has only not been taken.
            text = f"{type(error).__name__}: {error}"
            logger.warning("frame of camera %d ahead of its window: the engine raised %s", frame.camera_index, text)
            self._recover(engine, error, text)
        with self._wake:
            self._busy_since_ns = 0
            self._counts["frames_ahead"] += not stale

    def _recover(self, engine: Engine, error: Exception, text: str) -> None:
        with self._wake:
            self._failures += 1
            self._last_error = text
        if _is_out_of_memory(error):
            # The traceback holds the frames, and with them the tensors of the failed step.
            error.__traceback__ = None
            _free_memory()
        try:
            engine.reset(f"after {type(error).__name__}")
        except Exception as again:
            self._failures = max(self._failures, self._reload_after)
            self._last_error = f"{text}; then reset raised {type(again).__name__}: {again}"

    def _finish(self, job: _Job, kind: OutcomeKind, prediction: Prediction | None = None, text: str = "") -> None:
        with self._wake:
            self._counts[kind] += 1
        finished_ns = time.monotonic_ns() if job.started_ns else 0
        self._on_outcome(
            Outcome(kind, job.observation, prediction, text, job.submitted_ns, job.started_ns, finished_ns)
        )

    def _report(self, fraction: float, text: str) -> None:
        self._progress = (fraction, text)

    def _fail(self, what: str, error: Exception) -> None:
        text = f"{what}: {type(error).__name__}: {error}"
        logger.error("%s", text, exc_info=error)
        self._last_error = text
        self._report(self._progress[0], text)
        self._set_state("failed")

    def _set_state(self, state: State) -> None:
        self._state = state
        if self._on_state is not None:
            self._on_state(state)


def _is_out_of_memory(error: Exception) -> bool:
    # torch.cuda.OutOfMemoryError by name: engines without torch need not import it.
    return isinstance(error, MemoryError) or any("OutOfMemory" in cls.__name__ for cls in type(error).__mro__)


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
