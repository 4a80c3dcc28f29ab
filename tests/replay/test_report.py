"""The figures of a report, against recordings whose figures are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosbags.rosbag2 import Writer
from rosbags.typesys import Stores, get_typestore

from flashdrive_node.evaluation.replay_report import DrivenPath, Percentiles, ReplayReport, make_report
from flashdrive_node.evaluation.report_page import page, summary_lines, write_report
from flashdrive_node.evaluation.world_bag import START_NS
from flashdrive_node.runtime.rig import Rig

STORE = get_typestore(Stores.ROS2_JAZZY)
PLAYED = {"played_s": 4.0, "messages": {}}


def record(k: int, age_ms: float, engine_ms: float) -> str:
    t0_ns = START_NS + 1_500_000_000 + k * 100_000_000
    x = np.arange(1, 65) * 0.1 * 11.5
    document: dict[str, Any] = {
        "window_id": k,
        "t0_ns": t0_ns,
        "published_ns": t0_ns + round(age_ms * 1e6),
        "trajectory": {"xyz_m": np.stack([x, 0 * x, 0 * x], 1).tolist()},
        "timings_ms": {"engine": engine_ms, "publish": 1.0} | ({"rare": 5.0} if k == 0 else {}),
        "nav_text": None,
        "reasoning": f"<b>window {k}</b>",
        "engine": {"name": "fake", "checkpoint": "none"},
    }
    return json.dumps(document)


def diagnostics(statuses: list[tuple[str, int, str, dict[str, str]]]) -> Any:
    t = STORE.types
    stamp = t["builtin_interfaces/msg/Time"](sec=0, nanosec=0)
    return t["diagnostic_msgs/msg/DiagnosticArray"](
        header=t["std_msgs/msg/Header"](stamp=stamp, frame_id=""),
        status=[
            t["diagnostic_msgs/msg/DiagnosticStatus"](
                level=level,
                name=f"flashdrive_node: {name}",
                message=text,
                hardware_id="",
                values=[t["diagnostic_msgs/msg/KeyValue"](key=k, value=v) for k, v in values.items()],
            )
            for name, level, text, values in statuses
        ],
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outputs") / "outputs"
    quiet, running = {"state": "starting"}, {"state": "running", "withheld_not_finite": "0"}
    last = {
        "state": "running",
        "withheld_not_finite": "2",
        "withheld_start": "1",
        "reset_clock_jump": "1",
        "windows_result": "13",
        "windows_superseded": "4",
        "windows_failed": "0",
        "last_reset": "clock_jump",
    }
    camera = {"received": "40", "used": "30", "held": "4", "dropped_not_needed": "6", "rate_hz": "10.00"}
    with Writer(path, version=9) as writer:
        string, array = "std_msgs/msg/String", "diagnostic_msgs/msg/DiagnosticArray"
        records = writer.add_connection("/flashdrive_node/output/record", string, typestore=STORE)
        reports = writer.add_connection("/diagnostics", array, typestore=STORE)

        def say(time_s: float, *statuses: tuple[str, int, str, dict[str, str]]) -> None:
            raw = STORE.serialize_cdr(diagnostics(list(statuses)), array)
            writer.write(reports, START_NS + round(time_s * 1e9), raw)

        say(0.0, ("inference", 1, "starting", quiet), ("camera front_wide", 2, "nothing received", camera))
        say(1.7, ("inference", 0, "running", running), ("camera front_wide", 0, "10.0 Hz", camera))
        for k in range(10):
            message = STORE.types[string](data=record(k, 100.0 + k, 60.0))
            writer.write(records, START_NS + round((1.6 + 0.1 * k) * 1e9), STORE.serialize_cdr(message, string))
        say(2.0, ("inference", 2, "withheld: not finite", running))
        say(2.5, ("inference", 2, "withheld: not finite", running))
        say(3.0, ("inference", 0, "running", last))
        say(4.5, ("camera front_wide", 2, "silent for 0.5 s", camera))
    return path


@pytest.fixture(scope="module")
def report(drive: Path, outputs: Path, rig: Rig) -> ReplayReport:
    return make_report(drive, outputs, rig, PLAYED, notes=["told by the caller"])


def test_counters_are_sorted_by_what_they_count(report: ReplayReport) -> None:
    assert report.published == 10
    assert report.withheld == {"not_finite": 2, "start": 1}
    assert report.dropped == {"superseded": 4}
    assert report.resets == {"clock_jump": 1}
    assert report.frames == {"front_wide": {"received": 40, "used": 30, "held": 4, "not_needed": 6}}


def test_faults_count_from_the_first_window_to_the_end_of_the_recording(report: ReplayReport) -> None:
    assert [(c.time_s, c.part, c.level, c.text) for c in report.changes] == [
        (2.0, "inference", "ERROR", "withheld: not finite"),
        (3.0, "inference", "OK", "running"),
    ]
    assert len(report.faults) == 1


def test_ages_and_latencies(report: ReplayReport) -> None:
    assert report.age_ms == Percentiles(10, 104.5, 108.55, 108.91, 109.0)
    assert report.latency_ms["engine"] == Percentiles(10, 60.0, 60.0, 60.0, 60.0)
    assert report.latency_ms["rare"].count == 1


def test_texts_say_everything_once_and_harmlessly(report: ReplayReport, outputs: Path) -> None:
    lines = "\n".join(summary_lines(report))
    for text in ("10 published, withheld not_finite 2, start 1", "superseded 4", "clock_jump 1", "told by the caller"):
        assert lines.count(text) == 1
    assert "without a model" in lines
    text = page(report, [json.loads(record(k, 100.0, 60.0)) for k in range(3)], None)
    assert "<b>window" not in text
    assert "&lt;b&gt;window 0&lt;/b&gt;" in text
    assert "told by the caller" in text


def test_run_without_outputs_still_has_a_report(drive: Path, rig: Rig, tmp_path: Path) -> None:
    empty = make_report(drive, None, rig, PLAYED, "the node ended with exit code 1")
    files = write_report(empty, rig, tmp_path / "report")
    assert set(files) == {"json", "html"}
    assert json.loads(files["json"].read_text())["published"] == 0
    assert "the node ended with exit code 1" in files["html"].read_text()


@given(
    speed=st.floats(1.0, 30.0),
    yaw_rate=st.floats(-0.5, 0.5),
    heading=st.floats(-3.1, 3.1),
    offset_s=st.floats(0.0, 3.0),
)
def test_driven_future_of_a_circle_is_that_circle(
    speed: float, yaw_rate: float, heading: float, offset_s: float
) -> None:
    time_s = np.arange(0.0, 9.0, 0.02)

    def circle(t: Any, yaw: Any) -> Any:
        if abs(yaw_rate) < 1e-6:
            return np.stack([speed * t * np.cos(yaw), speed * t * np.sin(yaw)], -1)
        radius, turned = speed / yaw_rate, yaw + yaw_rate * t
        return radius * np.stack([np.sin(turned) - np.sin(yaw), np.cos(yaw) - np.cos(turned)], -1)

    poses = np.column_stack([circle(time_s, heading) + np.array([100.0, -50.0]), heading + yaw_rate * time_s])
    path = DrivenPath((time_s * 1e9).astype(np.int64) + START_NS, poses)
    future = path.future(START_NS + round(offset_s * 1e9), 50)
    np.testing.assert_allclose(future, circle(np.arange(1, 51) * 0.1, 0.0), atol=2e-3)
    assert np.isnan(path.future(START_NS + 8_000_000_000)[-1]).all()
