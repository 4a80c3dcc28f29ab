"""The controller that drives published trajectories."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.faults import Faults, faults, no_faults
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, Scenario, Scene
from flashdrive_node.world.simulation import advance, drive, rollout
from flashdrive_node.world.state import State, first_state, perturb
from flashdrive_node.world.tracking import GENTLE_BRAKE, Trajectory, from_vehicle, newest, no_trajectory, track

AFTER_S = torch.arange(1, 65, dtype=torch.float64) * DT_S


def expert_plan(scene: Scene, state: State) -> Trajectory:
    """What the expert would do for 6.4 s, published in the vehicle frame as the node does."""
    poses = rollout(scene, state, 64).poses
    dx, dy = poses[..., 0] - state.x[:, None], poses[..., 1] - state.y[:, None]
    cos, sin = state.yaw.cos()[:, None], state.yaw.sin()[:, None]
    xy = torch.stack((cos * dx + sin * dy, cos * dy - sin * dx), dim=2)
    return from_vehicle(state, AFTER_S, xy.float(), (poses[..., 2] - state.yaw[:, None]).float(), poses[..., 3].float())


def follow(scene: Scene, steps: int, every: int, late: int) -> tuple[list[State], Faults]:
    """Drive the expert's plans: a new one every so many steps, driven from `late` steps after its t0 on."""
    states, wrong = [first_state(scene)], no_faults(scene)
    held = no_trajectory(states[0])
    waiting: dict[int, Trajectory] = {}
    for step in range(steps):
        state = states[-1]
        if step % every == 0:
            waiting[step + late] = expert_plan(scene, state)
        if step in waiting:
            held = newest(held, waiting.pop(step))
        after, _ = advance(scene, state, track(held, state).action if step >= late else None)
        wrong = Faults(*(a | b for a, b in zip(wrong, faults(scene, state, after), strict=True)))
        states.append(after)
    return states, wrong


@pytest.mark.parametrize(("late", "close_m"), [(0, 0.15), (3, 0.25)])
def test_the_experts_plans_are_driven_as_the_expert_drives(late: int, close_m: float) -> None:
    scene = sample_scenes(scene_keys("validation", np.arange(60)))
    steps = 120
    expert, _ = drive(scene, steps)
    driven, wrong = follow(scene, steps, every=10, late=late)
    assert int(wrong.any.sum()) == 0
    for row in range(len(scene)):
        # At the place where the vehicle is, not at the time: the two may be a moment apart.
        (path_s, path_d), (s, d) = (
            np.array([(float(one.s[row]), float(one.d[row])) for one in states]).T for states in (expert, driven)
        )
        assert np.abs(d - np.interp(s, path_s, path_d)).max() < close_m
    share = driven[-1].s / expert[-1].s
    assert float((share - 1).abs().median()) < 0.02
    assert float((share - 1).mean().abs()) < 0.02


def standing(speed: float, x: float = 0.0, y: float = 0.0, yaw: float = 0.0) -> tuple[Scene, State]:
    """One vehicle on an empty road, anywhere."""
    scene = sample_scenes(scene_keys("validation", [0]), Scenario.CRUISE)
    values = {"x": x, "y": y, "yaw": yaw, "speed": speed}
    state = dataclasses.replace(
        first_state(scene), **{k: torch.tensor([v], dtype=torch.float64) for k, v in values.items()}
    )
    return scene, state


def circle(state: State, speed: float, curvature: float) -> Trajectory:
    """A plan along an arc from where the vehicle is."""
    turn = AFTER_S * speed * curvature
    xy = torch.stack((turn.sin(), 1 - turn.cos()), dim=1) / curvature
    return from_vehicle(state, AFTER_S, xy[None], turn[None], torch.full((1, 64), speed))


def drive_plan(scene: Scene, state: State, plan: Trajectory, steps: int) -> list[State]:
    """Drive one plan, however old it gets."""
    states = [state]
    for _ in range(steps):
        states.append(advance(scene, states[-1], track(plan, states[-1], max_age_s=10.0).action)[0])
    return states


@pytest.mark.parametrize(("speed", "curvature"), [(2.0, 0.12), (8.0, -0.02), (15.0, 0.004)])
def test_an_arc_is_driven_as_an_arc_from_any_pose(speed: float, curvature: float) -> None:
    scene, state = standing(speed, x=30.0, y=-4.0, yaw=2.5)
    plan = circle(state, speed, curvature)
    for after in drive_plan(scene, state, plan, 50)[1:]:
        centre = state.x - state.yaw.sin() / curvature, state.y + state.yaw.cos() / curvature
        radius = torch.hypot(after.x - centre[0], after.y - centre[1])
        assert float((radius - 1 / abs(curvature)).abs()) < 0.02
        assert float(after.speed - speed) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("lateral", "heading"), [(0.6, 0.0), (-0.6, 0.0), (0.0, 0.1), (0.4, -0.07)])
def test_a_displaced_vehicle_comes_back_without_overshooting(lateral: float, heading: float) -> None:
    scene, start = standing(8.0)
    plan = circle(start, 8.0, 1e-6)
    row = torch.ones(1, dtype=torch.float64)
    state = perturb(scene, start, lateral * row, heading * row, row)
    offsets = torch.cat([after.y for after in drive_plan(scene, state, plan, 50)])
    assert abs(float(offsets[-1])) < 0.05
    if heading == 0.0:
        assert float((offsets * -np.sign(lateral)).max()) < 0.1


def test_without_a_trajectory_it_brakes_to_a_standstill_and_says_so() -> None:
    scene, state = standing(8.0)
    nothing = no_trajectory(state)
    for _ in range(60):
        command = track(nothing, state)
        assert not bool(command.following)
        assert command.action.tolist() == [[GENTLE_BRAKE, 0.0]]
        state, _ = advance(scene, state, command.action)
    assert float(state.speed) == 0.0


def test_an_old_trajectory_is_left_by_braking_along_it() -> None:
    scene, state = standing(8.0)
    plan = circle(state, 8.0, 0.02)
    states, following = [state], []
    for _ in range(60):
        command = track(plan, states[-1], max_age_s=0.95)
        following.append(bool(command.following))
        states.append(advance(scene, states[-1], command.action)[0])
    assert following == [True] * 10 + [False] * 50
    assert float(states[-1].speed) == 0.0
    radius = torch.hypot(states[-1].x, states[-1].y - 50.0)
    assert float((radius - 50.0).abs()) < 0.1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_trajectory_that_is_not_finite_is_none(bad: float) -> None:
    _, state = standing(8.0)
    good = circle(state, 8.0, 0.02)
    x = good.x.clone()
    x[0, 40] = bad
    broken = dataclasses.replace(good, x=x)
    assert not bool(broken.exists)
    assert not bool(track(broken, state).following)
    held = newest(good, broken)
    assert bool(held.exists)
    assert torch.equal(held.x, good.x)
    assert torch.equal(newest(broken, good).x, good.x)


@pytest.mark.parametrize("every", [1, 100])
def test_it_stops_where_the_plan_stops(every: int) -> None:
    """Also where every step brings a new plan, and an error of the position never shows."""
    scene, state = standing(4.0)

    def plan(state: State) -> Trajectory:
        speed = (state.speed - 2.0 * AFTER_S).clamp(min=0)
        x = (state.speed**2 - speed**2) / 4.0
        return from_vehicle(state, AFTER_S, torch.stack((x, 0 * x), dim=1)[None], 0 * x[None], speed[None])

    followed = plan(state)
    for step in range(40):
        followed = plan(state) if step % every == 0 else followed
        state, _ = advance(scene, state, track(followed, state, max_age_s=10.0).action)
    assert float(state.speed) < 0.02
    assert float(state.x) == pytest.approx(4.0, abs=0.12)


def test_it_does_not_start_long_before_the_plan() -> None:
    """Every step brings a plan that starts 1 s after the first one's t0, as the expert does at a stop sign."""
    scene, state = standing(0.0)
    begun = state.time_s
    while float(state.speed) < 0.1:
        until = 1.0 - float(state.time_s - begun)
        assert until > -0.5
        speed = state.speed + 1.6 * (AFTER_S - until).clamp(min=0)
        x = 0.1 * speed.cumsum(0)
        plan = from_vehicle(state, AFTER_S, torch.stack((x, 0 * x), dim=1)[None], 0 * x[None], speed[None])
        state, _ = advance(scene, state, track(plan, state).action)
    assert float(state.time_s - begun) > 0.8


def test_it_starts_from_a_standstill() -> None:
    scene, state = standing(0.0)
    speed = 1.5 * AFTER_S
    x = 0.75 * AFTER_S**2
    plan = from_vehicle(state, AFTER_S, torch.stack((x, 0 * x), dim=1)[None], 0 * x[None], speed[None])
    after = drive_plan(scene, state, plan, 20)[-1]
    assert float(after.speed) == pytest.approx(3.0, abs=0.1)
    assert float(after.x) == pytest.approx(3.0, abs=0.1)


def test_a_standing_plan_holds_the_vehicle() -> None:
    scene, state = standing(0.0)
    zero = torch.zeros(1, 64)
    plan = from_vehicle(state, AFTER_S, torch.zeros(1, 64, 2), zero, zero)
    command = track(plan, state)
    assert bool(command.following)
    assert torch.equal(command.action, torch.zeros(1, 2, dtype=torch.float64))
    assert float(advance(scene, state, command.action)[0].x) == 0.0


@pytest.mark.parametrize("shapes", [((1, 64, 3), (1, 64)), ((2, 64, 2), (1, 64)), ((1, 63, 2), (1, 64))])
def test_shapes_that_do_not_belong_together_are_named(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    _, state = standing(0.0)
    xy: Tensor = torch.zeros(shapes[0])
    with pytest.raises(ValueError, match=r"xy \[S, P, 2\].*found"):
        from_vehicle(state, AFTER_S, xy, torch.zeros(shapes[1]), torch.zeros(shapes[1]))
