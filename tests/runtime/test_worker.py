"""The engine's thread: one outcome per observation, latest wins, resets, failures, reloads, no leaks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from flashdrive_node.engine.fake import FakeSettings
from flashdrive_node.runtime.worker import EngineWorker
from support.worker_bench import Bench, Engine, observation


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench().start()
    yield bench
    bench.engine.release()
    assert bench.worker.close()
    assert bench.worker.status().state == "closed"
    assert bench.engine.calls[-1] == "close"
    assert bench.engine.threads == {"engine"}


def test_loads_warms_up_and_steps(bench: Bench) -> None:
    outcome = bench.step(7)
    assert outcome.kind == "result"
    assert outcome.prediction is not None
    assert outcome.prediction.window_id == 7
    assert 0 < outcome.submitted_ns <= outcome.started_ns <= outcome.finished_ns
    assert bench.engine.calls == ["load", "warm_up", "step 7"]
    bench.wait(lambda: bench.states[-1] == "ready")
    assert bench.states == ["loading", "warming", "ready", "busy", "ready"]
    status = bench.worker.status()
    assert status.info is not None
    assert status.info.name.startswith("fake")
    assert (status.progress, status.text, status.hanging) == (1.0, "ready", False)


def test_not_ready_refuses() -> None:
    bench = Bench(Engine(FakeSettings(load_s=0.2)))
    assert not bench.worker.submit(observation(1))
    bench.worker.start()
    bench.wait(lambda: bench.worker.status().progress > 0)
    assert bench.worker.status().state == "loading"
    assert not bench.worker.submit(observation(2))
    assert bench.worker.close()
    assert bench.outcomes == []
    assert not bench.worker.submit(observation(3))


def test_latest_wins(bench: Bench) -> None:
    bench.engine.set_fault("hang")
    bench.busy_with(1)
    for window_id in (2, 3, 4):
        assert bench.worker.submit(observation(window_id))
    bench.engine.set_fault("none")
    bench.wait(lambda: len(bench.outcomes) == 4)
    assert bench.kinds() == [(2, "superseded"), (3, "superseded"), (1, "result"), (4, "result")]
    assert bench.outcomes[0].started_ns == 0
    assert bench.outcomes[0].text == "window 3 took its place"


def test_reset_discards_running_and_waiting(bench: Bench) -> None:
    bench.engine.set_fault("hang")
    bench.busy_with(1)
    bench.worker.submit(observation(2))
    bench.worker.reset("clock jump")
    assert bench.kinds() == [(2, "discarded")]
    bench.worker.submit(observation(3))
    bench.engine.set_fault("none")
    bench.wait(lambda: len(bench.outcomes) == 3)
    assert bench.kinds() == [(2, "discarded"), (1, "discarded"), (3, "result")]
    # The overtaken window must not be the first of the new stream.
    assert bench.engine.calls[2:] == ["step 1", "reset clock jump", "step 3"]
    prediction = bench.outcomes[-1].prediction
    assert prediction is not None
    assert prediction.metrics["stream_windows"] == 1


def test_reset_between_taking_and_stepping(bench: Bench) -> None:
    """The state callback comes after the observation left the queue and before the engine sees it."""
    bench.step(1)
    bench.wait(lambda: bench.states[-1] == "ready")
    bench.worker._on_state = lambda state: bench.worker.reset("just now") if state == "busy" else None
    outcome = bench.step(2)
    assert (outcome.kind, outcome.started_ns) == ("discarded", 0)
    bench.worker._on_state = None
    bench.wait(lambda: bench.worker.status().state == "ready")
    assert bench.step(3).kind == "result"
    assert bench.engine.calls[2:] == ["step 1", "reset just now", "step 3"]


def test_every_reset_reaches_the_engine_between_windows() -> None:
    """Resets from another thread at any moment: no window of before a reset is in a stream with one of after it."""
    bench = Bench().start()
    epochs: dict[int, int] = {}
    resets = 0
    for window_id in range(1, 400):
        epochs[window_id] = resets
        bench.worker.submit(observation(window_id))
        if window_id % 3 == 0:
            bench.worker.reset(str(resets))
            resets += 1
    bench.wait(lambda: len(bench.outcomes) == 399)
    assert bench.worker.close()
    streams: list[set[int]] = [set()]
    for call in bench.engine.calls:
        if call.startswith("reset"):
            streams.append(set())
        elif call.startswith("step"):
            streams[-1].add(epochs[int(call.split()[1])])
    assert all(len(stream) <= 1 for stream in streams)
    assert Counter(kind for _, kind in bench.kinds()).total() == 399


def test_failure_is_reported_and_the_engine_reset(bench: Bench) -> None:
    bench.engine.set_fault("raise")
    outcome = bench.step(1)
    assert outcome.kind == "failed"
    assert outcome.text == "EngineError: the fault 'raise' is switched on"
    assert bench.engine.calls[-1] == "reset after EngineError"
    assert bench.worker.status().consecutive_failures == 1
    bench.engine.set_fault("none")
    assert bench.step(2).kind == "result"
    assert bench.worker.status().consecutive_failures == 0
    assert bench.worker.status().counts["loads"] == 1


@pytest.mark.parametrize("fault", ["raise", "out_of_memory"])
def test_repeated_failure_reloads(fault: str) -> None:
    bench = Bench(reload_pause_s=0.01).start()
    bench.engine.set_fault(fault)  # type: ignore[arg-type]
    bench.engine.failing_loads = 0
    for window_id in (1, 2):
        assert bench.step(window_id).kind == "failed"
    bench.engine.failing_loads = 2
    assert bench.step(3).kind == "failed"
    bench.wait(lambda: bench.worker.status().counts["loads"] == 4 and bench.worker.ready)
    bench.engine.set_fault("none")
    assert bench.step(4).kind == "result"
    assert bench.engine.calls.count("close") == 3
    assert bench.states.count("failed") == 2
    assert bench.worker.close()


def test_engine_that_cannot_be_reset_is_loaded_again(bench: Bench) -> None:
    bench.engine.set_fault("raise")
    bench.engine.failing_reset = True
    bench.step(1)
    bench.engine.failing_reset = False
    bench.engine.set_fault("none")
    bench.wait(lambda: bench.worker.status().counts["loads"] == 2 and bench.worker.ready)
    assert "device lost" in bench.worker.status().last_error
    assert bench.step(2).kind == "result"


def test_hang_shows_and_ends() -> None:
    bench = Bench(hang_timeout_s=0.02).start()
    bench.engine.set_fault("hang")
    bench.busy_with(1)
    bench.wait(lambda: bench.worker.status().hanging)
    assert bench.worker.status().state == "busy"
    assert bench.worker.status().step_s > 0.02
    assert not bench.worker.close(timeout_s=0.05)
    bench.engine.release()
    assert bench.worker.close()
    assert bench.kinds() == [(1, "result")]


def test_close_ends_what_waits() -> None:
    bench = Bench().start()
    bench.engine.set_fault("hang")
    bench.busy_with(1)
    bench.worker.submit(observation(2))
    closing = threading.Thread(target=bench.worker.close)
    closing.start()
    bench.wait(lambda: len(bench.outcomes) == 1)
    bench.engine.set_fault("none")
    closing.join()
    assert bench.kinds() == [(2, "closed"), (1, "result")]


def test_load_that_fails_says_so_and_closes() -> None:
    engine = Engine()
    engine.failing_loads = 1
    bench = Bench(engine)
    bench.worker.start()
    bench.wait(lambda: bench.worker.status().state == "failed")
    assert bench.worker.status().last_error == "engine could not be loaded: EngineError: no weights"
    assert bench.worker.close()


def test_engine_that_cannot_be_made_says_so() -> None:
    def make() -> Engine:
        raise ValueError("checkpoint is required")

    worker = EngineWorker(make, print)
    worker.start()
    deadline = time.monotonic() + 10
    while worker.status().state != "failed" and time.monotonic() < deadline:
        time.sleep(0.001)
    assert worker.status().text == "engine could not be loaded: ValueError: checkpoint is required"
    assert worker.close()


def test_thousand_cycles_leak_no_thread() -> None:
    before = threading.active_count()
    for window_id in range(1000):
        bench = Bench().start()
        assert bench.worker.submit(observation(window_id))
        assert bench.worker.close()
        assert bench.outcomes[0].kind in ("result", "closed")
    assert threading.active_count() == before


def test_unstarted_worker_closes() -> None:
    bench = Bench()
    assert bench.worker.close()
    assert bench.worker.status().state == "closed"
