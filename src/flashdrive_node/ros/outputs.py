"""Publishers of one configured node. A message is only built where somebody listens; the trajectory goes out first."""

from __future__ import annotations

import time
from copy import copy
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseArray
from nav_msgs.msg import Path
from rclpy.lifecycle import LifecyclePublisher
from rclpy.lifecycle.node import LifecycleNode
from rclpy.qos import QoSProfile
from std_msgs.msg import Header, String
from visualization_msgs.msg import MarkerArray

from flashdrive_node.engine.protocol import EngineInfo, Prediction
from flashdrive_node.ros import topics
from flashdrive_node.ros.inputs import OVERRIDABLE
from flashdrive_node.ros.markers import delete_all, markers
from flashdrive_node.ros.messages import (
    OutputFrame,
    autoware_trajectory_message,
    duration_message,
    joint_trajectory_message,
    path_message,
    poses,
    record_json,
    samples_message,
    stamp_message,
    trajectory_type,
)
from flashdrive_node.ros.parameters import Parameters
from flashdrive_node.runtime.pipeline import Delivery
from flashdrive_node.runtime.rig import Rig

#: Reliable; deep enough for a late reader, shallow enough not to hand out a second of old results.
OUTPUT_QOS = QoSProfile(depth=5)


class Outputs:
    """The lifecycle publishers: silent until the node is active."""

    def __init__(self, node: LifecycleNode, rig: Rig):
        self._node = node
        self._rig = rig
        self._publishers: list[LifecyclePublisher] = []
        self._trajectory_type = trajectory_type()
        self._trajectory = self._publisher(self._trajectory_type, topics.TRAJECTORY)
        self._path = self._publisher(Path, topics.PATH)
        self._samples = self._publisher(PoseArray, topics.TRAJECTORY_SAMPLES)
        self._reasoning = self._publisher(String, topics.REASONING)
        self._record = self._publisher(String, topics.RECORD)
        self._markers = self._publisher(MarkerArray, topics.MARKERS)
        self._timing = self._publisher(DiagnosticArray, topics.TIMING)

    def _publisher(self, kind: Any, topic: str) -> LifecyclePublisher:
        # Overrides are written into the profile that is passed: everyone needs one of its own.
        qos = copy(OUTPUT_QOS)
        publisher = self._node.create_lifecycle_publisher(kind, topic, qos, qos_overriding_options=OVERRIDABLE)
        self._publishers.append(publisher)
        return publisher

    def destroy(self) -> None:
        """Withdraw all publishers."""
        for publisher in self._publishers:
            self._node.destroy_lifecycle_publisher(publisher)
        self._publishers.clear()

    def publish(
        self,
        delivery: Delivery,
        prediction: Prediction,
        frame: OutputFrame,
        parameters: Parameters,
        engine: EngineInfo | None,
    ) -> dict[str, float]:
        """Publish one window; the times of all its stages in milliseconds."""
        header = Header(stamp=stamp_message(delivery.t0_ns), frame_id=frame.frame_id)
        sample = prediction.trajectory
        waypoints = poses(sample, frame)
        if _heard(self._trajectory):
            if self._trajectory_type.__module__.startswith("autoware"):
                trajectory = autoware_trajectory_message(header, sample, waypoints)
            else:
                trajectory = joint_trajectory_message(header, self._rig.base_frame, sample, waypoints)
            self._trajectory.publish(trajectory)
        if _heard(self._path):
            self._path.publish(path_message(header, waypoints))
        timings_ms = stage_times_ms(delivery, prediction)
        if _heard(self._reasoning):
            self._reasoning.publish(String(data=sample.reasoning))
        if _heard(self._record):
            now_ns = self._node.get_clock().now().nanoseconds
            text = record_json(delivery, prediction, frame.frame_id, engine, now_ns, timings_ms)
            self._record.publish(String(data=text))
        if _heard(self._timing):
            self._timing.publish(timing_message(header, timings_ms, prediction.metrics))
        if _heard(self._samples):
            self._samples.publish(samples_message(header, prediction, frame))
        if parameters.publish_markers and _heard(self._markers):
            width_m = parameters.vehicle_width or self._rig.vehicle_width_m
            # What is drawn is never older than what may be published.
            lifetime = duration_message(parameters.max_result_age_s)
            self._markers.publish(markers(header, prediction, frame, self._rig, width_m, lifetime))
        return timings_ms

    def clear_markers(self) -> None:
        """Take away what was drawn of a stream that ended."""
        stamp = self._node.get_clock().now().to_msg()
        self._markers.publish(delete_all(Header(stamp=stamp, frame_id=self._rig.base_frame)))


def stage_times_ms(delivery: Delivery, prediction: Prediction) -> dict[str, float]:
    """Every stage of one window up to this moment, milliseconds of the monotonic clock.

    ``gather``: last image received -> window chosen. ``decode``: -> handed to the worker. ``queue``: -> engine started.
    ``engine``: the step, with its own stages as ``engine.*``. ``publish``: engine ended -> trajectory published.
    ``input_to_engine`` and ``total``: last image received -> engine started, -> trajectory published.
    """
    now_ns = time.monotonic_ns()
    return {
        "gather": (delivery.chosen_ns - delivery.received_ns) / 1e6,
        "decode": (delivery.submitted_ns - delivery.chosen_ns) / 1e6,
        "queue": (delivery.started_ns - delivery.submitted_ns) / 1e6,
        "engine": (delivery.finished_ns - delivery.started_ns) / 1e6,
        **{f"engine.{stage}": value for stage, value in prediction.timings_ms.items()},
        "publish": (now_ns - delivery.finished_ns) / 1e6,
        "input_to_engine": (delivery.started_ns - delivery.received_ns) / 1e6,
        "total": (now_ns - delivery.received_ns) / 1e6,
    }


#: Metrics of a drafted reasoning, see `engine.novelty`.
REASONING_METRICS = ("novelty", "deliberative_share", "deliberative_mean", "accept_length")


def timing_message(header: Header, timings_ms: dict[str, float], metrics: dict[str, float]) -> DiagnosticArray:
    """``~/debug/timing``: a status whose values are the stages in milliseconds, and one of how routine the text was.

    The second is there where a drafter guesses; its ``novelty`` is the alert signal.
    """
    values = [KeyValue(key=f"{stage}_ms", value=f"{value:.3f}") for stage, value in timings_ms.items()]
    status = DiagnosticStatus(
        level=DiagnosticStatus.OK, name="timing", message=f"total {timings_ms['total']:.1f} ms", values=values
    )
    found = [status]
    if "novelty" in metrics:
        pairs = [KeyValue(key=name, value=f"{metrics[name]:.4f}") for name in REASONING_METRICS if name in metrics]
        message = f"novelty {metrics['novelty']:.2f}"
        found.append(DiagnosticStatus(level=DiagnosticStatus.OK, name="reasoning", message=message, values=pairs))
    return DiagnosticArray(header=header, status=found)


def _heard(publisher: LifecyclePublisher) -> bool:
    return bool(publisher.get_subscription_count())
