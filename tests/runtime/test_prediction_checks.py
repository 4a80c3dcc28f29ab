"""The checks before publication, each with a prediction that fails it and one that just passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashdrive_node.engine.protocol import Prediction, TrajectorySample
from flashdrive_node.runtime.checks import CheckRule, check_prediction

TIMES = np.arange(1, 65) / 10


def sample(v: float = 10.0, a: float = 0.0, **changes: Any) -> TrajectorySample:
    """A straight drive."""
    x = v * TIMES + a * TIMES**2 / 2
    straight = TrajectorySample(
        xyz=np.stack([x, 0 * x, 0 * x], axis=1).astype(np.float32),
        yaw=np.zeros(64, np.float32),
        speed=(v + a * TIMES).astype(np.float32),
        acceleration=np.full(64, a, np.float32),
        curvature=np.zeros(64, np.float32),
        reasoning="The road is clear.",
        reasoning_complete=True,
    )
    return replace(straight, **changes)


def prediction(*samples: TrajectorySample, chosen: int = 0, initial_speed: float = 10.0) -> Prediction:
    return Prediction(1, 0, samples, chosen, initial_speed)


def kinds(
    *samples: TrajectorySample, rule: CheckRule | None = None, age_s: float = 0.1, **arguments: float
) -> list[str]:
    found = check_prediction(prediction(*samples), age_s, rule or CheckRule(), **arguments)
    return [violation.kind for violation in found]


def changed(array: np.ndarray, at: Any, value: float) -> np.ndarray:
    out = array.copy()
    out[at] = value
    return out


@pytest.mark.parametrize("acceleration", [-1.5, 0.0, 3.0])
def test_smooth_drives_pass(acceleration: float) -> None:
    assert kinds(sample(a=acceleration)) == []


@pytest.mark.parametrize("name", ["xyz", "yaw", "speed", "acceleration", "curvature"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(name: str, value: float) -> None:
    assert kinds(sample(**{name: changed(getattr(sample(), name), 40, value)})) == ["not_finite"]


def test_speed_of_the_vehicle_that_is_not_finite() -> None:
    assert kinds(sample(), vehicle_speed_mps=np.nan) == ["not_finite"]


def test_start_far_from_the_vehicle() -> None:
    jumped = sample(xyz=sample().xyz + np.float32([1.5, 0, 0]))
    found = check_prediction(prediction(jumped), 0.1, CheckRule())
    assert [v.kind for v in found] == ["start"]
    assert found[0].text == "first waypoint is 2.50 m from the vehicle, at most 2.00 m"
    assert kinds(sample(xyz=sample().xyz + np.float32([0.9, 0, 0]))) == []
    # The odometry's speed counts where it is given, not the engine's own estimate.
    assert kinds(sample(), vehicle_speed_mps=-0.5) == []
    assert kinds(sample(v=25.0), vehicle_speed_mps=2.0) == ["start"]


def test_bounds() -> None:
    assert kinds(sample(acceleration=changed_accel(9.8))) == []
    assert kinds(sample(acceleration=changed_accel(-9.9))) == ["acceleration"]
    assert kinds(sample(curvature=np.full(64, -0.33, np.float32))) == []
    assert kinds(sample(curvature=np.full(64, 0.34, np.float32))) == ["curvature"]
    assert kinds(sample(curvature=np.full(64, 0.34, np.float32)), rule=CheckRule(max_curvature=0.5)) == []


def changed_accel(value: float) -> Any:
    return changed(np.zeros(64, np.float32), 5, value)


def test_speed_that_the_points_contradict() -> None:
    assert kinds(replace(sample(), speed=np.full(64, 12.5, np.float32))) == ["speed"]
    torn = replace(sample(), xyz=sample().xyz + np.where(TIMES > 3, 2.0, 0.0)[:, None].astype(np.float32))
    assert kinds(torn) == ["speed"]


def test_age() -> None:
    assert kinds(sample(), age_s=2.0) == []
    assert kinds(sample(), age_s=2.01) == ["age"]
    assert kinds(sample(), age_s=float("nan")) == ["age"]
    assert kinds(sample(), age_s=-0.5) == []
    assert kinds(sample(), age_s=-0.51) == ["age"]


def test_reasoning_without_an_end() -> None:
    cut = sample(reasoning_complete=False)
    assert kinds(cut) == ["reasoning"]
    assert kinds(cut, rule=CheckRule(require_complete_reasoning=False)) == []


def test_shapes() -> None:
    assert kinds(sample(yaw=np.zeros(63, np.float32))) == ["shape"]
    empty = {name: np.zeros(0, np.float32) for name in ("yaw", "speed", "acceleration", "curvature")}
    assert kinds(sample(xyz=np.zeros((0, 3), np.float32), **empty)) == ["shape"]


def test_another_sample_is_never_put_in_place_of_the_chosen_one() -> None:
    broken = sample(reasoning_complete=False)
    found = check_prediction(prediction(broken, sample(), broken, sample()), 0.1, CheckRule())
    assert [v.kind for v in found] == ["reasoning"]
    assert found[0].text.endswith("(sample 0 was chosen; passing samples: [1, 3])")
    assert check_prediction(prediction(broken, sample(), chosen=1), 0.1, CheckRule()) == []


def test_everything_that_is_wrong_is_named() -> None:
    bad = replace(
        sample(reasoning_complete=False), xyz=sample().xyz + np.float32(50), curvature=np.ones(64, np.float32)
    )
    assert kinds(bad, age_s=9.0) == ["reasoning", "start", "curvature", "age"]
