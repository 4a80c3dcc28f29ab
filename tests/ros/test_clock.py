"""A node whose clock is not that of its sensors publishes nothing and names the reason."""

from __future__ import annotations

import pytest

from support.node_process import Bench, NodeProcess
from support.observer import ERROR, Observer
from support.vehicle import Camera, Vehicle, write_rig

pytestmark = [pytest.mark.ros, pytest.mark.timeout(60)]


@pytest.mark.parametrize(
    ("node_sim", "vehicle_sim", "text"),
    [
        (True, False, "withheld: age: .* ahead of the node's clock .*use_sim_time"),
        (False, True, "no window: .* behind the node's clock .*use_sim_time"),
    ],
    ids=["simulated_clock_without_clock", "recording_without_use_sim_time"],
)
def test_the_wrong_clock_is_named(bench: Bench, tmp_path, node_sim, vehicle_sim, text):
    cameras = [Camera("left", 0, width=160, height=96), Camera("front", 1, width=160, height=96)]
    parameters = {
        "engine": "fake",
        "fake.latency_s": 0.01,
        "rig": write_rig(tmp_path, cameras),
        "use_sim_time": node_sim,
        "auto_activate": True,
        "diagnostics_period_s": 0.1,
    }
    with NodeProcess(bench, tmp_path, parameters) as node:
        observer = Observer(bench, node)
        with Vehicle(bench, node.full_name, cameras, sim_time=vehicle_sim):
            observer.wait_status("inference", ERROR, text, timeout_s=20.0)
        assert observer.count() == 0
        observer.close()
