"""The state of the inference: exactly one, the right one, with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diagnostic_msgs.msg import DiagnosticStatus

from flashdrive_node.engine.fake import FakeEngine
from flashdrive_node.ros.diagnostics import (
    QUIET_S,
    SETTLING_S,
    NodeState,
    Publication,
    changed,
    engine_status,
    inference_status,
    navigation_status,
)
from flashdrive_node.runtime.pipeline import Pipeline
from flashdrive_node.runtime.rig import load_rig
from flashdrive_node.runtime.ring_buffer import Refusal
from flashdrive_node.runtime.timing import StageTimings

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
NOW_S = 1000.0
ACTIVE = NodeState("active")


@pytest.fixture(scope="module")
def healthy():
    """The snapshot of a pipeline whose engine waits for the next window."""
    status = Pipeline(load_rig("sample"), FakeEngine, lambda delivery: None).status()
    worker = replace(status.worker, state="ready", info=FakeEngine().load())
    return replace(status, refusal=None, worker=worker)


def published(**changes) -> Publication:
    return replace(Publication(published=5, last="published", last_s=NOW_S - 0.05, since_s=NOW_S - 60), **changes)


def said(state, status, publication) -> tuple[bytes, str]:
    message = inference_status(state, status, publication, NOW_S)
    values = {pair.key: pair.value for pair in message.values}
    assert message.message.startswith(values["state"])
    return message.level, message.message


def test_states_without_an_engine(healthy):
    loading = replace(healthy, worker=replace(healthy.worker, state="loading", text="shard 2", progress=0.4))
    failed = replace(healthy, worker=replace(healthy.worker, state="failed", text="no such file"))
    assert said(NodeState("unconfigured"), None, Publication()) == (OK, "unconfigured")
    broken = NodeState("unconfigured", configure_error="no checkpoint")
    assert said(broken, None, Publication()) == (ERROR, "configure failed: no checkpoint")
    assert said(ACTIVE, loading, Publication()) == (WARN, "loading: shard 2 40%")
    assert said(ACTIVE, failed, Publication()) == (ERROR, "engine failed: no such file")


def test_states_of_an_engine_that_is_ready(healthy):
    hanging = replace(healthy, worker=replace(healthy.worker, state="busy", hanging=True, step_s=12.0))
    assert said(NodeState("inactive"), healthy, Publication())[1].startswith("inactive")
    assert said(NodeState("active", paused=True), healthy, published()) == (WARN, "paused: by ~/pause")
    assert said(ACTIVE, hanging, published())[1].startswith("hanging: the engine has been computing one window for 12")
    assert said(ACTIVE, healthy, published())[0] == OK
    assert said(ACTIVE, healthy, published(last="withheld", last_text="start: far")) == (ERROR, "withheld: start: far")
    failed = published(last="failed", last_text="MemoryError")
    assert said(ACTIVE, healthy, failed) == (ERROR, "engine error: MemoryError")


def test_a_missing_frame_is_no_fault_before_results_stay_away(healthy):
    refused = replace(healthy, refusal=Refusal("silent", "camera front silent", "front"))
    assert said(ACTIVE, refused, published())[0] == OK
    assert said(ACTIVE, refused, published(last_s=NOW_S - QUIET_S - 0.1)) == (ERROR, "no window: camera front silent")


def test_after_a_reset_the_stream_may_settle(healthy):
    refused = replace(healthy, refusal=Refusal("odometry_span", "odometry covers 0.3 s"))
    settling = published(since_s=NOW_S - 1.0, last_s=NOW_S - 2.0, since_text="reset by service")
    assert said(ACTIVE, refused, settling) == (WARN, "starting: reset by service; odometry covers 0.3 s")
    late = published(since_s=NOW_S - SETTLING_S - 0.1, last_s=NOW_S - 9.0)
    assert said(ACTIVE, refused, late) == (ERROR, "no window: odometry covers 0.3 s")


def test_the_engine_says_when_it_is_slower_than_the_windows(healthy):
    timings = StageTimings()
    timings.add({"engine": 40.0})
    status = engine_status(healthy.worker, 0.0, timings.statistics())
    assert status.level == OK
    assert {pair.key: pair.value for pair in status.values}["engine_p50_ms"] == "40.00"
    slow = engine_status(healthy.worker, 0.75, {})
    assert (slow.level, "75%" in slow.message) == (WARN, True)
    assert engine_status(None, 0.0, {}).message == "unconfigured"


def test_changes_worth_telling_are_levels_and_states(healthy):
    running = [inference_status(ACTIVE, healthy, published(), NOW_S), navigation_status("Turn left", "")]
    later = [inference_status(ACTIVE, healthy, published(published=6), NOW_S), navigation_status("Turn right", "")]
    withheld = [inference_status(ACTIVE, healthy, published(last="withheld"), NOW_S), navigation_status(None, "")]
    refused = [running[0], navigation_status("Turn left", "too long")]
    for status in (*running, *later, *withheld, *refused):
        status.name = f"car/flashdrive_node: {status.name}" if ":" not in status.name else status.name
    assert not changed(running, later)
    assert changed(running, withheld)
    assert changed(running, refused)
    assert changed([], running)
