"""The model's own networks behind the node: a small checkpoint of the release's format, from images to a path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashdrive_node.runtime.checks import CheckRule
from support.node_process import Bench, NodeProcess
from support.observer import ERROR, OK, Observer
from support.vehicle import Camera, Vehicle, write_rig

pytestmark = [pytest.mark.ros, pytest.mark.timeout(120)]

CHECKPOINT = Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"


@pytest.mark.parametrize(
    ("engine", "own", "name"),
    [
        ("plain", {}, "plain alpamayo1_5"),
        ("streaming", {"stream_mode": "kv", "flow_schedule": "8:0,1,2,7"}, "streaming (kv) alpamayo1_5"),
    ],
)
def test_images_become_a_trajectory_of_the_model(bench: Bench, tmp_path, engine, own, name):
    camera = Camera("front", 1, width=320, height=192)
    # A small random model drives wildly and never ends its text: bounds that only what is broken exceeds.
    bounds = {"max_acceleration": 20.0, "max_curvature": 2.0, "max_result_age_s": 30.0}
    parameters = bounds | own
    parameters |= {
        "engine": engine,
        "checkpoint": CHECKPOINT,
        "device": "cpu",
        "precision": "float32",
        "rig": write_rig(tmp_path, [camera]),
        "auto_activate": True,
        "num_samples": 2,
        "max_generation_length": 8,
        "require_complete_reasoning": False,
        "diagnostics_period_s": 0.2,
    }
    with NodeProcess(bench, tmp_path, parameters) as node:
        observer = Observer(bench, node)
        with Vehicle(bench, node.full_name, [camera], speed_mps=8.0):
            observer.wait_count(3, "output/record", timeout_s=60.0)
            observer.wait_status("inference", OK, "running")
            first, *_, last = observer.records()
            assert node.set_parameters(require_complete_reasoning=True) == []
            observer.wait_status("inference", ERROR, "withheld: reasoning")
        observer.close()
    for record in (first, last):
        assert record["engine"]["name"] == name
        assert len(record["engine"]["sha256"]) == 64
        assert len(record["samples"]) == 2
        assert record["initial_speed_m_s"] == pytest.approx(8.0, rel=0.01)
        assert {"engine.encode", "engine.prefill", "engine.decode", "engine.action"} <= set(record["timings_ms"])
        xyz = np.array(record["trajectory"]["xyz_m"])
        assert xyz.shape == (64, 3)
        assert np.linalg.norm(xyz[0]) < 0.8 + CheckRule.start_margin_m
    assert last["window_id"] > first["window_id"]
    assert last["trajectory"] != first["trajectory"]
