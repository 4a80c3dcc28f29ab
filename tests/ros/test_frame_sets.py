"""Real cameras over real DDS: every window holds the frames that belong to it, and no window is left out."""

from __future__ import annotations

import dataclasses
import time

import pytest

from support.frame_sets import Window, missed_windows, window_of, wrong_frames
from support.node_process import PAINTED_PROBE, NodeProcess
from support.observer import Observer
from support.vehicle import Camera, Delivered, Vehicle, write_rig

pytestmark = [pytest.mark.ros, pytest.mark.timeout(90)]
CLEAN_S, ROUGH_S = 2.0, 4.5
REFERENCE = "front_wide"


@pytest.mark.parametrize(
    ("rates_hz", "odometry_hz"),
    [
        ((10.0,) * 4, 10.0),
        ((20.0,) * 4, 400.0),
        ((30.0,) * 4, 50.0),
        ((36.0,) * 4, 100.0),
        ((30.0, 10.0, 36.0, 20.0), 25.0),
    ],
    ids=["10", "20", "30", "36", "mixed"],
)
def test_every_window_holds_the_right_frames(bench, tmp_path, rates_hz, odometry_hz):
    cameras = [
        Camera("cross_left", 0, rates_hz[0], skew_s=0.013),
        Camera("front_wide", 1, rates_hz[1], skew_s=0.007),
        Camera("cross_right", 2, rates_hz[2], skew_s=0.0),
        Camera("front_tele", 6, rates_hz[3], skew_s=0.020),
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
        with Vehicle(bench, node.full_name, cameras, odometry_hz=odometry_hz, seed=int(sum(rates_hz))):
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


def recorded(name: str, index: int, offset_ns: int) -> Camera:
    camera = Camera(name, index, 30.0)
    for number in range(60):
        stamp_ns = 10**18 + number * 33_333_333 + offset_ns
        camera.delivered[stamp_ns] = Delivered(number, stamp_ns, number / 30)
    return camera


def test_the_judge_sees_what_is_wrong():
    cameras = {"front_wide": recorded("front_wide", 1, 0), "front_tele": recorded("front_tele", 6, 9_000_000)}
    picked = {name: sorted(camera.delivered.values(), key=lambda f: f.number) for name, camera in cameras.items()}

    def window(last: int, tele: tuple[int, ...] = (-9, -6, -3, 0)) -> Window:
        offsets = {"front_wide": (-9, -6, -3, 0), "front_tele": tele}
        stamps = {name: tuple(picked[name][last + o].stamp_ns for o in offsets[name]) for name in cameras}
        seen = {name: tuple(picked[name][last + o].number for o in offsets[name]) for name in cameras}
        return Window(picked["front_wide"][last].stamp_ns, stamps, seen)

    good = window(30)
    assert wrong_frames(good, cameras, REFERENCE) == []
    older = window(30, tele=(-10, -7, -4, -1))
    assert len(wrong_frames(older, cameras, REFERENCE)) >= 3
    mixed = dataclasses.replace(good, seen=good.seen | {"front_tele": (21, 24, 28, 30)})
    assert "picture of frame 28" in wrong_frames(mixed, cameras, REFERENCE)[0]
    swapped = dataclasses.replace(good, stamps_ns=good.stamps_ns | {"front_tele": good.stamps_ns["front_tele"][::-1]})
    assert "not 4 increasing" in wrong_frames(swapped, cameras, REFERENCE)[0]
    moved = dataclasses.replace(good, t0_ns=good.t0_ns + 1)
    assert "t0 is not the newest stamp" in wrong_frames(moved, cameras, REFERENCE)[0]
    assert missed_windows([window(30), window(33), window(36)], cameras, REFERENCE) == []
    left_out = missed_windows([window(30), window(39)], cameras, REFERENCE)
    assert picked["front_wide"][33].stamp_ns in left_out
    for camera in cameras.values():
        for stamp_ns, frame in camera.delivered.items():
            if frame.number > 30:  # all at once, behind a pause
                camera.delivered[stamp_ns] = dataclasses.replace(frame, published_s=1.3 + frame.number / 1000)
    assert missed_windows([window(30), window(39)], cameras, REFERENCE) == []
