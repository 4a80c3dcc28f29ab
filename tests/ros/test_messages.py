"""What the messages say is what the prediction says, in the frame that the header names."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nav_msgs.msg import Odometry
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Header
from trajectory_msgs.msg import MultiDOFJointTrajectory

from flashdrive_node.engine.protocol import EngineInfo, ReasoningToken
from flashdrive_node.ros import messages
from flashdrive_node.ros.messages import OutputFrame
from flashdrive_node.ros.outputs import stage_times_ms, timing_message
from support.windows import T0_NS, arc, delivery, prediction

HEADER = Header(stamp=messages.stamp_message(T0_NS), frame_id="base_link")
BASE = OutputFrame("base_link")


def rotated(q: tuple[float, ...], v: np.ndarray) -> np.ndarray:
    """The vector turned by the quaternion (x, y, z, w), by Rodrigues' formula."""
    axis, w = np.array(q[:3]), q[3]
    return v + 2 * np.cross(axis, np.cross(axis, v) + w * v)


@st.composite
def unit_quaternions(draw):
    values = [draw(st.floats(-1, 1)) for _ in range(4)]
    norm = math.sqrt(sum(v * v for v in values))
    if norm < 0.1:
        return (0.0, 0.0, 0.0, 1.0)
    return tuple(v / norm for v in values)


def round_trip(message):
    return deserialize_message(serialize_message(message), type(message))


@given(unit_quaternions(), st.floats(-3.1, 3.1))
def test_points_and_orientations_agree_in_every_frame(q, yaw):
    frame = OutputFrame("odom", (10.0, -20.0, 3.0), q)
    ahead = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    origin, tip = frame.points(np.array([[0.0, 0.0, 0.0], ahead]))
    assert origin == pytest.approx([10.0, -20.0, 3.0])
    assert tip - origin == pytest.approx(rotated(q, ahead), abs=1e-9)
    (orientation,) = frame.orientations(np.array([yaw]))
    assert rotated(tuple(orientation), np.array([1.0, 0.0, 0.0])) == pytest.approx(tip - origin, abs=1e-9)
    up = rotated(q, np.array([0.0, 0.0, 1.0]))
    assert rotated(tuple(orientation), np.array([0.0, 0.0, 1.0])) == pytest.approx(up, abs=1e-9)


@given(st.integers(0, 4_000_000_000_000_000_000))
def test_stamps_keep_every_nanosecond(time_ns):
    message = messages.stamp_message(time_ns)
    assert 0 <= message.nanosec < 1_000_000_000
    assert messages.stamp_ns(message) == time_ns


def test_path_is_the_chosen_trajectory_stamped_t0():
    result = prediction(arc(5.0, 0.0), arc(10.0, 0.02), chosen=1)
    path = round_trip(messages.path_message(HEADER, messages.poses(result.trajectory, BASE)))
    assert messages.stamp_ns(path.header.stamp) == T0_NS
    assert path.header.frame_id == "base_link"
    assert len(path.poses) == 64
    for pose, xyz, yaw in zip(path.poses, result.samples[1].xyz, result.samples[1].yaw, strict=True):
        p, q = pose.pose.position, pose.pose.orientation
        assert (p.x, p.y, p.z) == pytest.approx(tuple(xyz))
        assert 2 * math.atan2(q.z, q.w) == pytest.approx(float(yaw))
        assert messages.stamp_ns(pose.header.stamp) == T0_NS


def test_joint_trajectory_carries_times_speeds_and_yaw_rates():
    sample = arc(8.0, 0.05, acceleration=1.0)
    waypoints = messages.poses(sample, BASE)
    message = round_trip(messages.joint_trajectory_message(HEADER, "base_link", sample, waypoints))
    assert message.joint_names == ["base_link"]
    assert len(message.points) == 64
    for k, point in enumerate(message.points):
        at_s = point.time_from_start.sec + point.time_from_start.nanosec / 1e9
        assert at_s == pytest.approx(0.1 * (k + 1), abs=1e-9)
        speed = 8.0 + at_s
        assert point.velocities[0].linear.x == pytest.approx(speed, rel=1e-5)
        assert point.velocities[0].angular.z == pytest.approx(0.05 * speed, rel=1e-5)
        assert point.accelerations[0].linear.x == pytest.approx(1.0)
        assert point.transforms[0].translation.x == pytest.approx(float(sample.xyz[k, 0]))


def test_samples_stand_one_behind_the_other():
    result = prediction(arc(5.0, 0.0), arc(6.0, 0.01), arc(7.0, -0.01), chosen=2)
    message = round_trip(messages.samples_message(HEADER, result, BASE))
    assert len(message.poses) == 3 * 64
    for k, sample in enumerate(result.samples):
        assert message.poses[64 * k + 63].position.y == pytest.approx(float(sample.xyz[63, 1]))


def test_record_ties_everything_together():
    result = prediction(arc(5.0, 0.0), arc(8.0, 0.01, text="Slow down: „Kind“ läuft."), chosen=1)
    window = delivery(result)
    engine = EngineInfo("plain alpamayo1_5", "/models/a", "ab12", "cuda", "bfloat16", 16, 64, 0.1)
    record = json.loads(messages.record_json(window, result, "odom", engine, T0_NS + 5, {"engine": 39.0004}))
    assert record["version"] == messages.RECORD_VERSION
    assert (record["window_id"], record["t0_ns"], record["published_ns"]) == (7, T0_NS, T0_NS + 5)
    assert record["frame_stamps_ns"] == {name: list(stamps) for name, stamps in window.stamps_ns.items()}
    assert record["camera_indices"] == {"left": 0, "tele": 6}
    assert (record["chosen"], record["reasoning"]) == (1, "Slow down: „Kind“ läuft.")
    assert record["nav_text"] == "Turn left in 40m"
    assert [s["end_speed_m_s"] for s in record["samples"]] == [5.0, 8.0]
    assert np.array(record["trajectory"]["xyz_m"]) == pytest.approx(result.trajectory.xyz, abs=1e-4)
    assert np.array(record["trajectory"]["curvature_1_m"]) == pytest.approx(result.trajectory.curvature, abs=1e-6)
    assert record["pose_at_t0"]["position_m"] == [100.0, -50.0, 2.0]
    assert record["timings_ms"] == {"engine": 39.0}
    assert record["metrics"] == {"accept_length": 3.0}
    assert record["engine"]["sha256"] == "ab12"


def test_stage_times_cover_the_window_without_a_gap():
    window = delivery(prediction(arc(8.0, 0.0)))
    times = stage_times_ms(window, window.prediction)
    assert (times["gather"], times["decode"], times["queue"], times["engine"]) == (2.0, 8.0, 1.0, 39.0)
    assert (times["engine.encode"], times["engine.decode"]) == (1.5, 2.5)
    assert times["input_to_engine"] == 11.0
    stages = ("gather", "decode", "queue", "engine", "publish")
    assert sum(times[stage] for stage in stages) == pytest.approx(times["total"])
    (status,) = timing_message(HEADER, times, {"tokens": 3.0}).status
    assert {pair.key: float(pair.value) for pair in status.values}["engine_ms"] == 39.0


def test_labels_and_novelty_go_out_with_the_reasoning():
    sample = replace(arc(5.0, 0.0), tokens=(ReasoningToken("Keep", False), ReasoningToken(" lane", True)))
    result = replace(prediction(sample), metrics={"novelty": 2.0, "deliberative_share": 0.5, "accept_length": 1.0})
    window = delivery(result)
    record = json.loads(messages.record_json(window, result, "odom", None, T0_NS, {}))
    assert record["reasoning_tokens"] == [["Keep", False], [" lane", True]]
    _, status = round_trip(timing_message(HEADER, {"total": 1.0}, result.metrics)).status
    assert (status.name, status.message) == ("reasoning", "novelty 2.00")
    values = {pair.key: float(pair.value) for pair in status.values}
    assert values == {"novelty": 2.0, "deliberative_share": 0.5, "accept_length": 1.0}


def test_odometry_keeps_frames_pose_and_twist():
    message = Odometry(header=Header(stamp=messages.stamp_message(T0_NS), frame_id="map"), child_frame_id="base_link")
    message.pose.pose.position.y, message.pose.pose.orientation.z = 4.0, 1.0
    message.pose.pose.orientation.w = 0.0
    message.twist.twist.linear.x, message.twist.twist.angular.z = 7.0, 0.3
    sample = messages.odometry_sample(message)
    assert (sample.stamp_ns, sample.frame_id, sample.child_frame_id) == (T0_NS, "map", "base_link")
    assert sample.position == (0.0, 4.0, 0.0)
    assert sample.orientation_xyzw == (0.0, 0.0, 1.0, 0.0)
    assert sample.linear_velocity == (7.0, 0.0, 0.0)
    assert sample.angular_velocity == (0.0, 0.0, 0.3)


def test_standard_trajectory_where_autoware_is_not_installed():
    assert messages.trajectory_type() is MultiDOFJointTrajectory


def test_autoware_trajectory_where_it_is_installed(monkeypatch):
    """Against classes with exactly the fields of autoware_planning_msgs 1.x, which pip does not have."""
    fields = (
        *("time_from_start", "pose", "longitudinal_velocity_mps", "lateral_velocity_mps", "acceleration_mps2"),
        *("heading_rate_rps", "front_wheel_angle_rad", "rear_wheel_angle_rad"),
    )
    package = types.ModuleType("autoware_planning_msgs")
    package.__spec__ = types.SimpleNamespace(name="autoware_planning_msgs")
    package.msg = types.ModuleType("autoware_planning_msgs.msg")
    package.msg.Trajectory = _message_class("Trajectory", ("header", "points"))
    package.msg.TrajectoryPoint = _message_class("TrajectoryPoint", fields)
    monkeypatch.setitem(sys.modules, "autoware_planning_msgs", package)
    monkeypatch.setitem(sys.modules, "autoware_planning_msgs.msg", package.msg)
    assert messages.trajectory_type() is package.msg.Trajectory
    sample = arc(8.0, 0.05, acceleration=-1.0)
    message = messages.autoware_trajectory_message(HEADER, sample, messages.poses(sample, BASE))
    assert message.header is HEADER
    first, last = message.points[0], message.points[-1]
    assert first.time_from_start.nanosec == 100_000_000
    assert (last.time_from_start.sec, last.time_from_start.nanosec) == (6, 400_000_000)
    assert first.longitudinal_velocity_mps == pytest.approx(7.9)
    assert first.heading_rate_rps == pytest.approx(7.9 * 0.05)
    assert first.acceleration_mps2 == pytest.approx(-1.0)


def _message_class(name: str, fields: tuple[str, ...]) -> type:
    def fill(self, **values):
        unknown = set(values) - set(fields)
        assert not unknown, f"{name} has no field {unknown}"
        self.__dict__.update(values)

    return type(name, (), {"__init__": fill})
