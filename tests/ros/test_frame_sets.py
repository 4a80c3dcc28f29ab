"""Real cameras over real DDS: every window holds the frames that belong to it, and no window is left out."""

from __future__ import annotations

import time

import pytest

from support.frame_sets import missed_windows, window_of, wrong_frames
from support.node_process import PAINTED_PROBE, NodeProcess
from support.observer import Observer
from support.vehicle import Camera, Vehicle, write_rig

pytestmark = [pytest.mark.ros, pytest.mark.timeout(90)]
CLEAN_S, ROUGH_S = 2.5, 5.0
REFERENCE = "front_wide"


@pytest.mark.parametrize("rate_hz", [10.0, 20.0, 30.0, 36.0])
def test_every_window_holds_the_right_frames(bench, tmp_path, rate_hz):
    cameras = [
        Camera("cross_left", 0, rate_hz, skew_s=0.013),
        Camera("front_wide", 1, rate_hz, skew_s=0.007),
        Camera("cross_right", 2, rate_hz, skew_s=0.0),
        Camera("front_tele", 6, rate_hz, skew_s=0.020),
    ]
    by_name = {camera.name: camera for camera in cameras}
    parameters = {
        "engine": "fake",
        "fake.latency_s": 0.02,
        "fake.probe": PAINTED_PROBE,
        "rig": write_rig(tmp_path, cameras),
        "auto_activate": True,
        "publish_markers": False,
    }
    with NodeProcess(bench, tmp_path, parameters) as node:
        observer = Observer(bench, node, topics=("output/record",))
        with Vehicle(bench, node.full_name, cameras, seed=int(rate_hz)):
            observer.wait_count(1, "output/record", timeout_s=30.0)
            time.sleep(CLEAN_S)
            clean = len(observer.records())
            for camera in cameras:
                camera.loss, camera.reorder, camera.jitter_s, camera.delay_s = 0.05, 0.03, 0.003, 0.01
            time.sleep(ROUGH_S)
        windows = [window_of(record, by_name) for record in observer.records()]
        observer.close()

    t0s = [window.t0_ns for window in windows]
    assert t0s == sorted(set(t0s)), "a t0 was answered twice or out of order"
    problems = {window.t0_ns: wrong for window in windows if (wrong := wrong_frames(window, by_name, REFERENCE))}
    assert problems == {}
    missed = missed_windows(windows, by_name, REFERENCE)
    assert missed == []
    assert clean >= 0.9 * CLEAN_S * 10, f"{clean} windows in {CLEAN_S} s without loss"
    assert len(windows) - clean >= 5, "no windows under loss"
