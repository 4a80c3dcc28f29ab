"""What a prediction must satisfy before it is published. A prediction that fails is withheld, never repaired."""

from __future__ import annotations

from dataclasses import dataclass

from flashdrive_node.engine.protocol import Prediction


@dataclass(frozen=True)
class CheckRule:
    """Bounds of a prediction that may be published."""

    #: Largest age (now - t0) at publication, seconds.
    max_result_age_s: float = 2.0
    #: Largest |acceleration|, m/s^2, and |curvature|, 1/m.
    max_acceleration: float = 9.8
    max_curvature: float = 0.33
    require_complete_reasoning: bool = True
    #: How much further than v0 * dt the first waypoint may be from the vehicle, metres.
    start_margin_m: float = 1.0
    #: Largest difference between the speed field and the speed that successive points imply, m/s.
    speed_tolerance_mps: float = 2.0
    waypoint_dt_s: float = 0.1


@dataclass(frozen=True)
class Violation:
    """One reason to withhold a prediction."""

    #: "not_finite", "start", "acceleration", "curvature", "speed", "age", "reasoning", "shape".
    kind: str
    text: str


def check_prediction(
    prediction: Prediction, age_s: float, rule: CheckRule, vehicle_speed_mps: float | None = None
) -> list[Violation]:
    """Everything that speaks against publishing; empty means publish.

    Args:
        prediction: The engine's answer.
        age_s: Now minus t0, on the node's clock.
        rule: Bounds.
        vehicle_speed_mps: Speed at t0 by the odometry; without it the engine's own estimate is used.
    """
    raise NotImplementedError
