"""The fault table, row by row, against one node that must survive all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fault_rows import ROWS
from support.faults import COMPRESSED, RAW, SIZE, FaultRow, Scene, markdown, play
from support.node_process import Bench, NodeProcess
from support.observer import Observer, Status
from support.vehicle import Camera, Vehicle, write_rig

pytestmark = [pytest.mark.ros, pytest.mark.timeout(60)]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "faults.md"


@pytest.fixture(scope="module")
def scene(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("faults")
    width, height = SIZE
    cameras = [
        Camera(COMPRESSED, 0, width=width, height=height),
        Camera(RAW, 1, transport="raw", width=width, height=height),
    ]
    parameters = {
        "engine": "fake",
        "fake.latency_s": 0.02,
        "hang_timeout_s": 0.5,
        "rig": write_rig(folder, cameras),
        "use_sim_time": True,
        "auto_activate": True,
        "diagnostics_period_s": 0.1,
    }
    with NodeProcess(bench, folder, parameters) as node:
        observer = Observer(bench, node)
        with Vehicle(bench, node.full_name, cameras, sim_time=True) as vehicle:
            yield Scene(bench, node, vehicle, observer)
        observer.close()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_fault(scene: Scene, row: FaultRow):
    play(row, scene)


def test_every_report_is_complete(scene: Scene):
    """Whatever happened above: one state of the inference at a time, and one status of every part."""
    reports: dict[float, list[Status]] = {}
    for status in scene.observer.statuses:
        reports.setdefault(status.at_s, []).append(status)
    parts = ["camera front", "camera left", "engine", "inference", "navigation", "odometry"]
    known = {"unconfigured", "loading", "starting", "running", "no window", "withheld", "engine error", "hanging"}
    known |= {"paused", "inactive"}
    assert len(reports) > 10
    for statuses in reports.values():
        names = sorted(status.name.partition(": ")[2] for status in statuses)
        assert names in (parts, ["engine", "inference"]), names
        state = next(s.values["state"] for s in statuses if s.name.endswith("inference"))
        assert state in known
        assert all(status.text for status in statuses)


def test_documentation_is_made_from_the_rows():
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(ROWS)
