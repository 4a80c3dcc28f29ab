"""Publishes /diagnostics: at its period, and at once when a level or the state of the inference changes."""

from __future__ import annotations

from collections.abc import Mapping

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import QoSProfile

from flashdrive_node.ros import topics
from flashdrive_node.ros.diagnostics import (
    NodeState,
    Publication,
    camera_status,
    changed,
    engine_status,
    inference_status,
    navigation_status,
    odometry_status,
)
from flashdrive_node.ros.navigation import Navigation
from flashdrive_node.runtime.pipeline import PipelineStatus
from flashdrive_node.runtime.rig import Rig
from flashdrive_node.runtime.timing import StageStatistics, StageTimings


class Reporter:
    """What was reported last, and when."""

    def __init__(self, node: Node, rig: Rig, period_s: float):
        self._node = node
        self._rig = rig
        self._period_s = period_s
        self._publisher = node.create_publisher(DiagnosticArray, topics.DIAGNOSTICS, QoSProfile(depth=10))
        # Several nodes share the topic: the name says whose status it is.
        self._prefix = node.get_fully_qualified_name().lstrip("/")
        self._reported: list[DiagnosticStatus] = []
        self._reported_s = float("-inf")
        self._windows = (0, 0)
        self._superseded = 0.0
        self._times: dict[str, StageStatistics] = {}

    def report(
        self,
        state: NodeState,
        pipeline: PipelineStatus | None,
        publication: Publication,
        navigation: Navigation,
        camera_info: Mapping[int, tuple[int, int]],
        timings: StageTimings,
        now_s: float,
    ) -> None:
        """Publish where it is due; ``now_s`` is monotonic."""
        due = now_s - self._reported_s >= self._period_s
        if due:
            self._measure_superseded(pipeline)
            self._times = timings.statistics()
        statuses = [inference_status(state, pipeline, publication, now_s)]
        if pipeline is not None:
            active = state.lifecycle == "active" and not state.paused
            statuses += [
                camera_status(
                    camera,
                    self._rig.camera(camera.index),
                    camera_info.get(camera.index),
                    active,
                    pipeline.refusal,
                )
                for camera in pipeline.cameras
            ]
            statuses.append(odometry_status(pipeline, active))
            statuses.append(navigation_status(navigation.text, navigation.problem))
        worker = pipeline.worker if pipeline is not None else None
        statuses.append(engine_status(worker, self._superseded, self._times))
        for status in statuses:
            status.name = f"{self._prefix}: {status.name}"
            status.hardware_id = self._rig.name
        if due or changed(self._reported, statuses):
            self._reported, self._reported_s = statuses, now_s
            array = DiagnosticArray(status=statuses)
            array.header.stamp = self._node.get_clock().now().to_msg()
            self._publisher.publish(array)

    def _measure_superseded(self, pipeline: PipelineStatus | None) -> None:
        """Share of the windows since the last report that newer ones replaced before the engine took them."""
        counts = pipeline.worker.counts if pipeline is not None else {}
        now = (counts.get("submitted", 0), counts.get("superseded", 0))
        submitted, superseded = now[0] - self._windows[0], now[1] - self._windows[1]
        self._windows = now
        self._superseded = superseded / submitted if submitted > 0 else 0.0
