"""The end of the process and of a configuration, at the worst moments, and again and again."""

from __future__ import annotations

import signal
import time

import pytest

from support.node_process import Bench, NodeProcess
from support.observer import ERROR, OK, WARN, Observer
from support.vehicle import Camera, Vehicle, write_rig

pytestmark = [pytest.mark.ros, pytest.mark.timeout(90)]
#: Cycles before memory and descriptors are measured, and between the two measurements.
WARM_CYCLES, CYCLES = 4, 12


def cameras() -> list[Camera]:
    return [Camera("left", 0, width=160, height=96), Camera("front", 1, width=160, height=96)]


def parameters(folder, **further):
    known = {"engine": "fake", "fake.latency_s": 0.01, "rig": write_rig(folder, cameras()), "hang_timeout_s": 0.3}
    return known | {"diagnostics_period_s": 0.1} | further


def test_a_hanging_engine_keeps_nobody_from_leaving(bench: Bench, tmp_path):
    with NodeProcess(bench, tmp_path, parameters(tmp_path, auto_activate=True)) as node:
        observer = Observer(bench, node)
        with Vehicle(bench, node.full_name, cameras()):
            observer.wait_count(1, timeout_s=20.0)
            assert node.set_parameters(fake__fault="hang") == []
            observer.wait_status("inference", ERROR, "hanging")
            # A lifecycle transition first: the node is as good as new.
            assert node.change("deactivate")
            assert node.change("cleanup")
            assert node.set_parameters(fake__fault="none") == []
            assert node.change("configure")
            assert node.change("activate")
            observer.wait_count(2, timeout_s=15.0)
            # Then a signal, while it hangs again.
            since_s = time.monotonic()
            assert node.set_parameters(fake__fault="hang") == []
            observer.wait_status("inference", ERROR, "hanging", since_s=since_s)
            node.send(signal.SIGTERM)
            assert node.wait(10.0) == 0
        observer.close()
    assert "Traceback" not in node.output


def test_an_engine_that_still_loads_can_be_left(bench: Bench, tmp_path):
    with NodeProcess(bench, tmp_path, parameters(tmp_path, **{"auto_activate": True, "fake.load_s": 60.0})) as node:
        observer = Observer(bench, node, topics=())
        observer.wait_status("inference", WARN, "loading", timeout_s=20.0)
        assert node.state() == "active"
        assert node.change("deactivate")
        node.send(signal.SIGINT)
        assert node.wait(15.0) == 0
        observer.close()
    assert "Traceback" not in node.output


def test_configuring_again_and_again_leaks_nothing(bench: Bench, tmp_path):
    with NodeProcess(bench, tmp_path, parameters(tmp_path)) as node:
        observer = Observer(bench, node)
        with Vehicle(bench, node.full_name, cameras()):
            observer.wait_status("inference", OK, "unconfigured", timeout_s=20.0)
            figures = []
            for cycle in range(WARM_CYCLES + CYCLES + 1):
                for transition in ("configure", "activate", "deactivate", "cleanup"):
                    assert node.change(transition), (cycle, transition)
                if cycle in (WARM_CYCLES, WARM_CYCLES + CYCLES):
                    usage = node.usage()
                    figures.append((usage.num_threads(), usage.num_fds(), usage.memory_info().rss / 1e6))
            before, after = figures
            assert after[0] <= before[0], f"threads grew from {before[0]} to {after[0]}"
            assert after[1] <= before[1], f"descriptors grew from {before[1]} to {after[1]}"
            assert after[2] < before[2] + 5.0, f"memory grew from {before[2]:.1f} to {after[2]:.1f} MB"
            assert node.change("configure")
            assert node.change("activate")
            observer.wait_count(2, timeout_s=15.0)
        observer.close()
        assert node.stop() == 0
    assert "Traceback" not in node.output
