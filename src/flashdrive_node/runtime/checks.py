"""What a prediction must satisfy before it is published. A prediction that fails is withheld, never repaired."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashdrive_node.engine.protocol import Prediction, TrajectorySample


@dataclass(frozen=True)
class CheckRule:
    """Bounds of a prediction that may be published."""

    #: Largest age (now - t0) at publication, seconds.
    max_result_age_s: float = 2.0
    #: How far t0 may be ahead of the node's clock, seconds: clocks of machines differ a little.
    max_ahead_s: float = 0.5
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
    speed = prediction.initial_speed if vehicle_speed_mps is None else vehicle_speed_mps
    sample = prediction.trajectory
    violations = _check_sample(sample, speed, rule)
    if violations and len(prediction.samples) > 1:
        passing = [i for i, other in enumerate(prediction.samples) if not _check_sample(other, speed, rule)]
        note = f" (sample {prediction.chosen} was chosen; passing samples: {passing or 'none'})"
        violations = [Violation(v.kind, v.text + note) for v in violations]
    if not age_s <= rule.max_result_age_s:
        violations.append(Violation("age", f"result is {age_s:.2f} s old, at most {rule.max_result_age_s:.2f} s"))
    if age_s < -rule.max_ahead_s:
        text = f"t0 is {-age_s:.2f} s ahead of the node's clock (is use_sim_time set, and nobody publishes /clock?)"
        violations.append(Violation("age", text))
    return violations


def _check_sample(sample: TrajectorySample, initial_speed_mps: float, rule: CheckRule) -> list[Violation]:
    violations: list[Violation] = []

    def violate(kind: str, text: str) -> None:
        violations.append(Violation(kind, text))

    count = len(sample.xyz)
    rows = {
        "xyz": (sample.xyz, (count, 3)),
        "yaw": (sample.yaw, (count,)),
        "speed": (sample.speed, (count,)),
        "acceleration": (sample.acceleration, (count,)),
        "curvature": (sample.curvature, (count,)),
    }
    shapes = [f"{name} {array.shape}" for name, (array, shape) in rows.items() if array.shape != shape]
    if shapes or count == 0:
        violate("shape", f"arrays must have one row per waypoint ({count}), found {', '.join(shapes) or 'none'}")
        return violations
    broken = [name for name, (array, _) in rows.items() if not np.isfinite(array).all()]
    if broken or not np.isfinite(initial_speed_mps):
        violate("not_finite", f"values that are not finite in {', '.join(broken) or 'the initial speed'}")
        return violations
    if not sample.reasoning_complete and rule.require_complete_reasoning:
        violate("reasoning", "the reasoning text has no end")
    first_m = float(np.linalg.norm(sample.xyz[0]))
    reach_m = abs(initial_speed_mps) * rule.waypoint_dt_s + rule.start_margin_m
    if first_m > reach_m:
        violate("start", f"first waypoint is {first_m:.2f} m from the vehicle, at most {reach_m:.2f} m")
    for kind, values, bound, unit in (
        ("acceleration", sample.acceleration, rule.max_acceleration, "m/s^2"),
        ("curvature", sample.curvature, rule.max_curvature, "1/m"),
    ):
        worst = int(np.argmax(np.abs(values)))
        # float32 values that were clipped to the bound may exceed it by rounding.
        if abs(float(values[worst])) > bound * (1 + 1e-5):
            violate(kind, f"{kind} at waypoint {worst} is {values[worst]:.2f} {unit}, at most {bound:.2f}")
    implied = np.linalg.norm(np.diff(sample.xyz, axis=0), axis=1) / rule.waypoint_dt_s
    # A step is covered at a speed between those of its ends.
    mean = np.abs(sample.speed[1:] + sample.speed[:-1]) / 2
    difference = np.abs(implied - mean)
    if count > 1 and difference.max() > rule.speed_tolerance_mps:
        worst = int(np.argmax(difference))
        violate(
            "speed",
            f"points imply {implied[worst]:.1f} m/s after waypoint {worst}, the speed there is {mean[worst]:.1f} m/s "
            f"(tolerance {rule.speed_tolerance_mps:.1f})",
        )
    return violations
