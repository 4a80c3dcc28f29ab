"""The node as a process: its lifecycle, outputs, services, parameters and how it ends."""

from __future__ import annotations

import itertools
import math
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from nav_msgs.msg import Path as PathMessage
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from std_srvs.srv import SetBool, Trigger
from visualization_msgs.msg import Marker

from flashdrive_node.ros.node import FlashdriveNode
from flashdrive_node.runtime.pipeline import Pipeline
from support.node_process import Bench, NodeProcess, wait_until
from support.observer import ERROR, OK, OUTPUTS, WARN, Observer
from support.vehicle import Camera, Vehicle, write_rig
from support.windows import arc, delivery, prediction

pytestmark = [pytest.mark.ros, pytest.mark.timeout(120)]

SPEED_MPS, YAW_RATE_RPS = 8.0, 0.1


def cameras() -> list[Camera]:
    return [Camera("left", 0, width=160, height=96), Camera("front", 1, width=160, height=96)]


def a_node(bench: Bench, folder, **parameters) -> NodeProcess:
    known = {"engine": "fake", "fake.latency_s": 0.01, "rig": write_rig(folder, cameras()), "diagnostics_period_s": 0.2}
    return NodeProcess(bench, folder, known | {k.replace("__", "."): v for k, v in parameters.items()})


def a_vehicle(bench: Bench, node: NodeProcess) -> Vehicle:
    return Vehicle(bench, node.full_name, cameras(), speed_mps=SPEED_MPS, yaw_rate_rps=YAW_RATE_RPS)


def test_the_whole_lifecycle_twice(bench: Bench, tmp_path):
    with a_node(bench, tmp_path, fake__load_s=1.0) as node:
        observer = Observer(bench, node, topics=("output/path", "output/trajectory_samples"))
        with a_vehicle(bench, node):
            assert node.state() == "unconfigured"
            observer.wait_status("inference", OK, "unconfigured")
            for samples in (2, 3):
                assert node.set_parameters(num_samples=samples) == []
                start_s = time.monotonic()
                assert node.change("configure")
                # Still loading, and everything else alive: diagnostics, parameters, and activation in advance.
                observer.wait_status("inference", WARN, "loading", since_s=start_s)
                (reason,) = node.set_parameters(num_samples=5)
                assert "call cleanup first" in reason
                assert node.change("activate")
                assert not node.change("activate"), "a second activation was accepted"
                assert not node.change("cleanup"), "an active node was cleaned up"
                assert node.state() == "active"
                observer.wait_count(2, timeout_s=20.0)
                observer.wait_status("engine", OK, "fake", since_s=start_s)
                (first, *_) = observer.wait_count(1, "output/trajectory_samples")
                assert len(first.message.poses) == samples * 64
                assert node.change("deactivate")
                observer.wait_status("inference", OK, "inactive", since_s=time.monotonic())
                published = observer.count()
                time.sleep(0.3)
                assert observer.count() == published, "published while inactive"
                assert node.change("cleanup")
                wait_until(
                    lambda: not bench.node.count_publishers(f"{node.full_name}/output/path"), 5.0, "topics to go"
                )
                assert bench.node.count_subscribers(f"{node.full_name}/input/odometry") == 0
                assert threads(node) == threads_of_an_idle_node(node), "the engine's threads are left over"
        assert node.change("shutdown")
        assert node.state() == "finalized"
        assert not node.change("configure")
        assert node.stop() == 0
        observer.close()


def threads(node: NodeProcess) -> int:
    return node.usage().num_threads()


_idle_threads: dict[int, int] = {}


def threads_of_an_idle_node(node: NodeProcess) -> int:
    """Threads of the process when it was first cleaned up: DDS and ROS keep some of their own."""
    return _idle_threads.setdefault(node.pid, threads(node))


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)])
def test_signals_end_the_node_cleanly(bench: Bench, tmp_path, signals):
    with a_node(bench, tmp_path, auto_activate=True, fake__latency_s=0.3) as node:
        observer = Observer(bench, node)
        with a_vehicle(bench, node):
            observer.wait_count(1, timeout_s=20.0)
            for number in signals:
                node.send(number)
            assert node.wait() == 0
        assert "Traceback" not in node.output
        observer.close()


def test_what_cannot_be_configured_says_why_and_can_be_mended(bench: Bench, tmp_path):
    with a_node(bench, tmp_path, engine="plain") as node:
        observer = Observer(bench, node)
        assert not node.change("configure")
        assert node.state() == "unconfigured"
        observer.wait_status("inference", ERROR, "configure failed.*'checkpoint' is required")
        assert node.set_parameters(engine="fake") == []
        assert node.change("configure")
        observer.wait_status("inference", OK, "inactive")
        assert node.change("activate")
        assert node.change("shutdown")
        assert node.state() == "finalized"
        observer.close()


def test_a_checkpoint_that_cannot_be_loaded_is_said_and_mended(bench: Bench, tmp_path):
    with a_node(bench, tmp_path, engine="plain", checkpoint=str(tmp_path / "missing"), device="cpu") as node:
        observer = Observer(bench, node)
        assert node.change("configure")
        status = observer.wait_status("engine", ERROR, "failed.*missing", timeout_s=60.0)
        assert "EngineError" in status.text or "cannot be loaded" in status.text
        assert not node.change("activate"), "activated without an engine"
        assert node.state() == "inactive"
        assert node.change("cleanup")
        assert node.set_parameters(engine="fake") == []
        assert node.change("configure")
        observer.wait_status("engine", OK, "fake")
        observer.close()


def test_outputs_of_one_window_agree(bench: Bench, tmp_path):
    with a_node(bench, tmp_path, auto_activate=True, num_samples=3, output_frame="odom") as node:
        observer = Observer(bench, node, topics=tuple(OUTPUTS))
        with a_vehicle(bench, node) as vehicle:
            observer.wait_count(3, "debug/markers", timeout_s=20.0)
            records = {record["t0_ns"]: record for record in observer.records()}
            t0_ns = sorted(records)[1]
            record = records[t0_ns]
            path = at(observer, "output/path", t0_ns)
            trajectory = at(observer, "output/trajectory", t0_ns)
            samples = at(observer, "output/trajectory_samples", t0_ns)
            timing: DiagnosticArray = at(observer, "debug/timing", t0_ns)
            markers = [
                m
                for received in observer.outputs["debug/markers"]
                for m in received.message.markers
                if m.action == Marker.ADD and stamp(m.header) == t0_ns
            ]
            for message in (path, trajectory, samples, *markers):
                assert message.header.frame_id == "odom" == record["frame_id"]
            # The vehicle goes on along its circle: the path must lie where its odometry will be.
            for k in (0, 31, 63):
                later = vehicle.odometry_at(t0_ns + (k + 1) * 100_000_000).pose.pose
                p = path.poses[k].pose
                assert (p.position.x, p.position.y) == pytest.approx((later.position.x, later.position.y), abs=0.05)
                assert turned(p) == pytest.approx(turned(later), abs=0.01)
                q = trajectory.points[k].transforms[0].translation
                assert (q.x, q.y) == (p.position.x, p.position.y)
                assert trajectory.points[k].velocities[0].angular.z == pytest.approx(YAW_RATE_RPS, rel=0.02)
            start, end = np.array(record["trajectory"]["xyz_m"])[[0, -1]]
            assert np.linalg.norm(start) == pytest.approx(SPEED_MPS * 0.1, rel=0.02)
            assert list(end) == pytest.approx(record["samples"][record["chosen"]]["end_m"])
            assert len(samples.poses) == 3 * 64
            assert {m.ns for m in markers} == {"path", "samples", "reasoning", "vehicle"}
            values = {pair.key: float(pair.value) for pair in timing.status[0].values}
            assert values["engine_ms"] == pytest.approx(record["timings_ms"]["engine"], abs=0.001)
            assert 0 < values["input_to_engine_ms"] < values["total_ms"]
            texts = [received.message.data for received in observer.outputs["output/reasoning"]]
            assert record["reasoning"] in texts
            for stamps in record["frame_stamps_ns"].values():
                assert stamps[-1] == pytest.approx(t0_ns, abs=50_000_000)
                assert len(stamps) == 4
                assert all(a < b for a, b in itertools.pairwise(stamps))
            services(bench, node, observer)
        observer.close()


def services(bench: Bench, node: NodeProcess, observer: Observer) -> None:
    """Reset and pause take what was drawn away; without an active node they say why they do nothing."""
    for kind, name, request in (
        (Trigger, "reset", Trigger.Request()),
        (SetBool, "pause", SetBool.Request(data=True)),
        (SetBool, "pause", SetBool.Request(data=False)),
    ):
        before = len(cleared(observer))
        answer = bench.call(kind, f"{node.full_name}/{name}", request)
        assert answer.success, answer.message
        observer.wait(lambda: len(cleared(observer)) > before, 5.0, f"DELETEALL after {name}")  # noqa: B023
    observer.wait_count(1)
    # Changes that act at once: the trajectory's bounds, and what is drawn.
    assert node.set_parameters(max_curvature=0.01) == []
    observer.wait_status("inference", ERROR, "withheld: curvature", since_s=time.monotonic())
    assert node.set_parameters(max_curvature=0.3) == []
    observer.wait_count(1)
    # The same for the clock: everything that was received under the other one is of no use.
    start_s = time.monotonic()
    assert node.set_parameters(use_sim_time=True) == []
    observer.wait_status("inference", WARN, "use_sim_time was switched", since_s=start_s)
    assert node.set_parameters(use_sim_time=False) == []
    observer.wait_count(2)
    assert node.change("deactivate")
    answer = bench.call(SetBool, f"{node.full_name}/pause", SetBool.Request(data=True))
    assert not answer.success
    assert "inactive" in answer.message
    assert node.change("cleanup")
    answer = bench.call(Trigger, f"{node.full_name}/reset", Trigger.Request())
    assert not answer.success
    assert "not configured" in answer.message


def cleared(observer: Observer) -> list[Marker]:
    received = list(observer.outputs["debug/markers"])
    return [m for r in received for m in r.message.markers if m.action == Marker.DELETEALL]


def at(observer: Observer, topic: str, t0_ns: int):
    """The message of a topic that is stamped t0."""
    found = observer.wait(
        lambda: [r.message for r in observer.outputs[topic] if stamp(r.message.header) == t0_ns],
        5.0,
        f"{topic} of {t0_ns}",
    )
    assert len(found) == 1
    return found[0]


def stamp(header) -> int:
    return header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def turned(pose) -> float:
    return 2 * math.atan2(pose.orientation.z, pose.orientation.w)


def test_a_transition_that_raises_leaves_a_node_that_can_be_configured(bench: Bench, tmp_path, monkeypatch):
    rig = write_rig(tmp_path, cameras())
    arguments = ["--ros-args", "-p", "engine:=fake", "-p", f"rig:={rig}", "-r", "__ns:=/raising"]
    node = FlashdriveNode(context=bench.context, cli_args=arguments)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("flashdrive_node.ros.node.Inputs", _raise)
            assert node.trigger_configure() == TransitionCallbackReturn.ERROR
        engines = [thread for thread in threading.enumerate() if thread.name == "engine"]
        assert not any(thread.is_alive() for thread in engines)
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        assert node.trigger_shutdown() == TransitionCallbackReturn.SUCCESS
    finally:
        node.close()
        node.destroy_node()


def _raise(*_: object) -> None:
    raise RuntimeError("no subscription today")


def test_a_pipeline_that_was_cleaned_up_delivers_into_the_void(bench: Bench, tmp_path, monkeypatch):
    deliver = []

    class Watched(Pipeline):
        def __init__(self, rig, make_engine, on_delivery, settings, on_state):
            deliver.append(on_delivery)
            super().__init__(rig, make_engine, on_delivery, settings, on_state)

    monkeypatch.setattr("flashdrive_node.ros.node.Pipeline", Watched)
    rig = write_rig(tmp_path, cameras())
    arguments = ["--ros-args", "-p", "engine:=fake", "-p", f"rig:={rig}", "-r", "__ns:=/void"]
    arguments += ["-p", "max_result_age_s:=60.0"]
    node = FlashdriveNode(context=bench.context, cli_args=arguments)
    executor = SingleThreadedExecutor(context=bench.context)
    executor.add_node(node)
    paths = []
    listener = bench.node.create_subscription(PathMessage, "/void/flashdrive_node/output/path", paths.append, 10)
    try:
        for _ in range(2):
            assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
            assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
            wait_until(lambda: bench.node.count_publishers(listener.topic_name), 5.0, "the publisher")
            now_ns = node.get_clock().now().nanoseconds
            fresh = replace(delivery(prediction(arc(8.0, 0.0))), t0_ns=now_ns, epoch=1)
            deliver[0](fresh)
            until_s = time.monotonic() + 0.4
            while time.monotonic() < until_s:
                executor.spin_once(timeout_sec=0.05)
            assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
            assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
        # The first pipeline's delivery came out while it was the node's own, and not again afterwards.
        assert len(paths) == 1
    finally:
        bench.node.destroy_subscription(listener)
        node.close()
        executor.shutdown()
        node.destroy_node()


def test_a_map_is_not_made_of_odometry(bench: Bench, tmp_path):
    with a_node(bench, tmp_path, auto_activate=True, output_frame="map") as node:
        observer = Observer(bench, node)
        with a_vehicle(bench, node):
            observer.wait_status("inference", ERROR, "withheld: output_frame.*'map'.*'odom'", timeout_s=20.0)
            assert observer.count() == 0
        observer.close()
