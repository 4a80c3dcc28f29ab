"""What RViz is given to draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
from geometry_msgs.msg import Point
from rclpy.serialization import deserialize_message, serialize_message
from std_msgs.msg import Header
from visualization_msgs.msg import Marker, MarkerArray

from flashdrive_node.ros import messages
from flashdrive_node.ros.markers import TEXT_LINES, TEXT_WIDTH, delete_all, markers, ribbon_edges
from flashdrive_node.ros.messages import OutputFrame
from flashdrive_node.runtime.rig import load_rig
from support.windows import T0_NS, arc, prediction

HEADER = Header(stamp=messages.stamp_message(T0_NS), frame_id="base_link")
LIFETIME = messages.duration_message(1.5)
RIG = load_rig("sample")


def drawn(result, frame=None) -> dict[tuple[str, int], Marker]:
    frame = frame or OutputFrame("base_link")
    array = markers(HEADER, result, frame, RIG, width_m=2.0, lifetime=LIFETIME)
    array = deserialize_message(serialize_message(array), MarkerArray)
    return {(marker.ns, marker.id): marker for marker in array.markers}


def xyz(points: list[Point]) -> np.ndarray:
    return np.array([[p.x, p.y, p.z] for p in points])


def test_everything_is_drawn_once_and_goes_by_itself():
    found = drawn(prediction(arc(5.0, 0.0), arc(6.0, 0.01), arc(7.0, 0.02), chosen=1))
    assert set(found) == {("path", 0), ("samples", 0), ("samples", 2), ("reasoning", 0), ("vehicle", 0)}
    for marker in found.values():
        assert marker.action == Marker.ADD
        assert (marker.lifetime.sec, marker.lifetime.nanosec) == (1, 500_000_000)
        assert messages.stamp_ns(marker.header.stamp) == T0_NS
        assert marker.color.a > 0
        assert math.hypot(marker.pose.orientation.z, marker.pose.orientation.w) == pytest.approx(1.0)


def test_the_ribbon_is_as_wide_as_the_vehicle_and_follows_the_path():
    sample = arc(8.0, 0.03)
    left, right = ribbon_edges(sample, 2.0)
    assert np.linalg.norm(left - right, axis=1) == pytest.approx(np.full(65, 2.0))
    assert ((left + right) / 2)[1:, :2] == pytest.approx(sample.xyz[:, :2], abs=1e-6)
    assert left[0, 1] == pytest.approx(1.0)
    ribbon = drawn(prediction(sample))["path", 0]
    assert ribbon.type == Marker.TRIANGLE_LIST
    assert len(ribbon.points) == len(ribbon.colors) == 64 * 6
    triangles = xyz(ribbon.points).reshape(-1, 3, 3)
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    # All face upwards, and their area is that of the strip.
    assert (normals[:, 2] > 0).all()
    assert normals[:, 2].sum() / 2 == pytest.approx(2.0 * 8.0 * 6.4, rel=0.01)


def test_braking_is_red_and_accelerating_is_blue():
    brake = drawn(prediction(arc(30.0, 0.0, acceleration=-3.0)))["path", 0].colors[0]
    go = drawn(prediction(arc(5.0, 0.0, acceleration=3.0)))["path", 0].colors[0]
    assert (brake.r, brake.g, brake.b) == (1.0, 0.0, 0.0)
    assert (go.r, go.g, go.b) == (0.0, 0.0, 1.0)


def test_reasoning_is_wrapped_and_cut_to_what_can_be_read():
    text = drawn(prediction(arc(5.0, 0.0, text="because of the pedestrian " * 40)))["reasoning", 0]
    lines = text.text.split("\n")
    assert len(lines) == TEXT_LINES
    assert max(map(len, lines)) <= TEXT_WIDTH
    assert lines[-1].endswith("...")
    assert text.type == Marker.TEXT_VIEW_FACING
    assert text.pose.position.z > RIG.vehicle_height_m


def test_the_outline_is_the_vehicle_around_the_rear_axle():
    outline = xyz(drawn(prediction(arc(5.0, 0.0)))["vehicle", 0].points)
    assert outline[:, 0].max() - outline[:, 0].min() == pytest.approx(RIG.vehicle_length_m)
    assert outline[:, 0].min() == pytest.approx(-RIG.rear_overhang_m)
    assert outline[:, 1].max() == pytest.approx(RIG.vehicle_width_m / 2)


def test_markers_move_with_the_output_frame():
    here = drawn(prediction(arc(5.0, 0.01)))
    there = drawn(prediction(arc(5.0, 0.01)), OutputFrame("odom", (10.0, 20.0, 0.0), (0.0, 0.0, 1.0, 0.0)))
    for key in (("path", 0), ("vehicle", 0)):
        assert xyz(there[key].points) == pytest.approx(xyz(here[key].points) * [-1, -1, 1] + [10.0, 20.0, 0.0])


def test_delete_all_takes_everything_away():
    (marker,) = delete_all(HEADER).markers
    assert marker.action == Marker.DELETEALL
