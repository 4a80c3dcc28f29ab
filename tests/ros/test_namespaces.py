"""Two vehicles in one domain, and everything that ROS lets an integrator change from outside."""

from __future__ import annotations

import itertools
import time

import pytest
from nav_msgs.msg import Path as PathMessage
from rcl_interfaces.srv import GetParameters
from rclpy.qos import QoSProfile, QoSReliabilityPolicy

from support.node_process import Bench, NodeProcess
from support.observer import ERROR, OK, Observer
from support.vehicle import Camera, Vehicle, write_rig

pytestmark = [pytest.mark.ros, pytest.mark.timeout(90)]


def two_cameras() -> list[Camera]:
    return [Camera("left", 0, width=160, height=96), Camera("front", 1, width=160, height=96)]


def parameters(folder, **further):
    folder.mkdir(exist_ok=True)
    known = {"engine": "fake", "fake.latency_s": 0.01, "rig": write_rig(folder, two_cameras()), "auto_activate": True}
    return known | {"diagnostics_period_s": 0.2} | further


def test_two_nodes_in_two_namespaces_coexist(bench: Bench, tmp_path):
    first = NodeProcess(bench, tmp_path, parameters(tmp_path / "a", num_samples=2), namespace="/car_a")
    second = NodeProcess(bench, tmp_path, parameters(tmp_path / "b", num_samples=5), namespace="/car_b")
    with first, second:
        a, b = Observer(bench, first), Observer(bench, second)
        with Vehicle(bench, first.full_name, two_cameras(), speed_mps=5.0):
            a.wait_count(3, timeout_s=30.0)
            # The second one has no vehicle yet: it says so, and takes nothing of the first one's.
            b.wait_status("inference", ERROR, timeout_s=20.0)
            assert b.count() == 0
            with Vehicle(bench, second.full_name, two_cameras(), speed_mps=15.0):
                b.wait_count(3, timeout_s=20.0)
                a.wait_count(3)
        for observer, speed_mps in ((a, 5.0), (b, 15.0)):
            poses = observer.outputs["output/path"][-1].message.poses
            reach_m = sum(_distance(p, q) for p, q in itertools.pairwise(poses))
            assert reach_m == pytest.approx(speed_mps * 6.3, rel=0.05)
        for node, samples in ((first, 2), (second, 5)):
            request = GetParameters.Request(names=["num_samples"])
            values = bench.call(GetParameters, f"{node.full_name}/get_parameters", request).values
            assert values[0].integer_value == samples
        a.close()
        b.close()


def _distance(p, q) -> float:
    return ((p.pose.position.x - q.pose.position.x) ** 2 + (p.pose.position.y - q.pose.position.y) ** 2) ** 0.5


def test_remaps_and_qos_overrides_reach_the_node(bench: Bench, tmp_path):
    cameras = two_cameras()
    inputs = {
        "left/image/compressed": "/sensing/left",
        "front/image/compressed": "/sensing/front",
        "odometry": "/localization/odometry",
        "navigation": "/route/text",
    }
    remaps = [(f"~/input/{topic}", target) for topic, target in inputs.items()]
    remaps.append(("~/output/path", "/planning/path"))
    override = "qos_overrides./planning/path.publisher.reliability"
    node = NodeProcess(
        bench, tmp_path, parameters(tmp_path) | {override: "best_effort"}, remappings=remaps, namespace="/remapped"
    )
    paths: list[PathMessage] = []
    reliable: list[PathMessage] = []
    best_effort = QoSProfile(depth=10, reliability=QoSReliabilityPolicy.BEST_EFFORT)
    subscriptions = [
        bench.node.create_subscription(PathMessage, "/planning/path", paths.append, best_effort),
        bench.node.create_subscription(PathMessage, "/planning/path", reliable.append, QoSProfile(depth=10)),
    ]
    with node:
        observer = Observer(bench, node, topics=("output/record",))
        with Vehicle(bench, node.full_name, cameras, topics=inputs):
            observer.wait_count(3, "output/record", timeout_s=30.0)
            observer.wait_status("inference", OK)
        time.sleep(0.2)
        observer.close()
    assert len(paths) >= 2
    assert reliable == [], "a best effort publisher reached a reliable subscriber"
    for subscription in subscriptions:
        bench.node.destroy_subscription(subscription)
