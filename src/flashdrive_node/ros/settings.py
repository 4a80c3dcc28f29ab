"""From the node's parameters to the rules of the layers below."""

from __future__ import annotations

from flashdrive_node.ros.parameters import Parameters
from flashdrive_node.runtime.checks import CheckRule
from flashdrive_node.runtime.ego_history import EgoRule
from flashdrive_node.runtime.pipeline import PipelineSettings
from flashdrive_node.runtime.ring_buffer import WindowRule


def pipeline_settings(parameters: Parameters) -> PipelineSettings:
    """How windows are formed; fixed when the node is configured."""
    return PipelineSettings(
        window=WindowRule(
            interval_s=parameters.frame_interval_s,
            tolerance_s=parameters.frame_tolerance_s,
            min_period_s=parameters.min_period_s,
        ),
        ego=EgoRule(max_gap_s=parameters.max_odometry_gap_s, max_extrapolation_s=parameters.max_extrapolation_s),
        ingest=parameters.ingest,
        hang_timeout_s=parameters.hang_timeout_s,
    )


def check_rule(parameters: Parameters) -> CheckRule:
    """What a result must satisfy to be published; may change at any time."""
    return CheckRule(
        max_result_age_s=parameters.max_result_age_s,
        max_acceleration=parameters.max_acceleration,
        max_curvature=parameters.max_curvature,
        require_complete_reasoning=parameters.require_complete_reasoning,
    )
