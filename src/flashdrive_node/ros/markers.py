"""``~/debug/markers``: the chosen path as wide as the vehicle, all samples, the reasoning and the vehicle."""

from __future__ import annotations

import textwrap

import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from numpy.typing import NDArray
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from flashdrive_node.engine.protocol import Prediction, TrajectorySample
from flashdrive_node.ros.messages import OutputFrame
from flashdrive_node.runtime.rig import Rig

#: Acceleration at which the ribbon is fully coloured, m/s^2.
FULL_COLOUR_ACCELERATION = 3.0
#: Characters per line and lines of the reasoning text in RViz.
TEXT_WIDTH, TEXT_LINES = 60, 6
#: Height of the ribbon over the ground, metres: samples lie under it.
RIBBON_HEIGHT_M, SAMPLE_HEIGHT_M = 0.10, 0.05


def markers(
    header: Header, prediction: Prediction, frame: OutputFrame, rig: Rig, width_m: float, lifetime: Duration
) -> MarkerArray:
    """What RViz draws for one window; every marker goes by itself after ``lifetime``."""
    return MarkerArray(
        markers=[
            _ribbon(header, lifetime, prediction.trajectory, frame, width_m),
            *(
                _sample(header, lifetime, k, sample, frame)
                for k, sample in enumerate(prediction.samples)
                if k != prediction.chosen
            ),
            _text(header, lifetime, prediction.trajectory.reasoning, frame, rig),
            _outline(header, lifetime, frame, rig),
        ]
    )


def delete_all(header: Header) -> MarkerArray:
    """Takes everything away that was drawn before."""
    return MarkerArray(markers=[Marker(header=header, action=Marker.DELETEALL)])


def ribbon_edges(sample: TrajectorySample, width_m: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Left and right edge [65, 3] of the strip that the vehicle covers, from the vehicle at t0 on, vehicle frame."""
    centre = np.vstack((np.zeros((1, 3)), sample.xyz.astype(np.float64)))
    yaw = np.concatenate(([0.0], sample.yaw.astype(np.float64)))
    left = np.stack((-np.sin(yaw), np.cos(yaw), np.zeros_like(yaw)), axis=-1) * (width_m / 2)
    centre[:, 2] += RIBBON_HEIGHT_M
    return centre + left, centre - left


def _ribbon(header: Header, lifetime: Duration, sample: TrajectorySample, frame: OutputFrame, width_m: float) -> Marker:
    left, right = (_points(frame.points(edge)) for edge in ribbon_edges(sample, width_m))
    colours = [_acceleration_colour(a) for a in sample.acceleration.tolist()]
    marker = _marker(header, lifetime, "path", 0, Marker.TRIANGLE_LIST, Vector3(x=1.0, y=1.0, z=1.0))
    for k, colour in enumerate(colours):
        # Counter-clockwise seen from above; corners that are shared are one object, which costs nothing.
        marker.points += [right[k], right[k + 1], left[k + 1], right[k], left[k + 1], left[k]]
        marker.colors += [colour] * 6
    return marker


def _sample(header: Header, lifetime: Duration, k: int, sample: TrajectorySample, frame: OutputFrame) -> Marker:
    marker = _marker(header, lifetime, "samples", k, Marker.LINE_STRIP, Vector3(x=0.08))
    marker.color = ColorRGBA(r=0.35, g=0.6, b=1.0, a=0.6)
    marker.points = _points(frame.points(sample.xyz + np.array([0.0, 0.0, SAMPLE_HEIGHT_M], np.float32)))
    return marker


def _text(header: Header, lifetime: Duration, text: str, frame: OutputFrame, rig: Rig) -> Marker:
    marker = _marker(header, lifetime, "reasoning", 0, Marker.TEXT_VIEW_FACING, Vector3(z=0.8))
    marker.color = ColorRGBA(r=1.0, g=1.0, b=1.0, a=1.0)
    marker.text = "\n".join(textwrap.wrap(text, TEXT_WIDTH, max_lines=TEXT_LINES, placeholder=" ..."))
    x, y, z = frame.points(np.array([[0.0, 0.0, rig.vehicle_height_m + 2.0]]))[0].tolist()
    marker.pose = Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(w=1.0))
    return marker


def _outline(header: Header, lifetime: Duration, frame: OutputFrame, rig: Rig) -> Marker:
    rear, front = -rig.rear_overhang_m, rig.vehicle_length_m - rig.rear_overhang_m
    half = rig.vehicle_width_m / 2
    corners = np.array([[front, half], [front, -half], [rear, -half], [rear, half], [front, half]])
    marker = _marker(header, lifetime, "vehicle", 0, Marker.LINE_STRIP, Vector3(x=0.06))
    marker.color = ColorRGBA(r=1.0, g=1.0, b=1.0, a=0.9)
    marker.points = _points(frame.points(np.column_stack((corners, np.full(5, SAMPLE_HEIGHT_M)))))
    return marker


def _marker(header: Header, lifetime: Duration, namespace: str, number: int, kind: int, scale: Vector3) -> Marker:
    return Marker(
        header=header,
        ns=namespace,
        id=number,
        type=kind,
        action=Marker.ADD,
        pose=Pose(orientation=Quaternion(w=1.0)),
        scale=scale,
        # Also the fallback of markers with a colour per point: fully transparent would hide them in some viewers.
        color=ColorRGBA(r=0.2, g=0.9, b=0.3, a=0.7),
        lifetime=lifetime,
    )


def _acceleration_colour(acceleration: float) -> ColorRGBA:
    """Green where speed is kept, towards red when braking, towards blue when accelerating."""
    share = float(np.clip(acceleration / FULL_COLOUR_ACCELERATION, -1.0, 1.0))
    return ColorRGBA(r=max(0.0, -share), g=1.0 - abs(share), b=max(0.0, share), a=0.7)


def _points(xyz: NDArray[np.float64]) -> list[Point]:
    return [Point(x=x, y=y, z=z) for x, y, z in xyz.tolist()]
