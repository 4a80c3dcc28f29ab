"""Closed-loop drives and their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation import closed_loop
from flashdrive_node.evaluation.closed_loop import ClosedLoop, Observation
from flashdrive_node.evaluation.closed_loop_run import (
    ClosedLoopWork,
    RunSettings,
    SceneRow,
    drive_batch,
    expert_scores,
    frames_for,
)
from flashdrive_node.evaluation.devices import spread
from flashdrive_node.evaluation.policies import ConstantVelocity, Plans, Policy
from flashdrive_node.evaluation.scores import Scores, Tally
from flashdrive_node.model.errors import InputError
from flashdrive_node.world import render
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import record
from flashdrive_node.world.faults import contacts, out_of_lane
from flashdrive_node.world.frames import FrameSettings, render_frames
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import Kind, Scenario, Scene
from flashdrive_node.world.state import State, first_state

NO_FRAMES = FrameSettings()


def scenes(scenario: Scenario, count: int = 4) -> Scene:
    return sample_scenes(scene_keys("validation", np.arange(count)), scenario)


def drive(policy: Policy | None, scene: Scene, seconds: float, replan: int = 5) -> list[SceneRow]:
    settings = RunSettings(seconds=seconds, replan=replan)
    return drive_batch(policy, range(len(scene)), scene, expert_scores(scene, settings.steps), settings, NO_FRAMES)


@pytest.mark.parametrize(
    ("scenario", "figure"),
    [
        (Scenario.BRAKING_LEAD, "front_collision"),
        (Scenario.TURN_LEFT, "off_road"),
        (Scenario.STOP_SIGN, "stop_sign"),
        (Scenario.PEDESTRIAN, "pedestrian"),
        (Scenario.RED_LIGHT, "red_light"),
    ],
)
def test_driving_straight_on_ends_as_the_scenario_says(scenario: Scenario, figure: str) -> None:
    scene = scenes(scenario, 6)
    rows = drive(ConstantVelocity(), scene, 13.0, replan=10)
    assert sum(row.scores[figure] for row in rows) >= 3
    for row in rows:
        failed = row.scores["at_fault_collision"] or row.scores["off_road"]
        assert row.scene_score == (0.0 if failed else row.progress)
        assert row.scores["at_fault_collision"] >= max(row.scores["front_collision"], row.scores["pedestrian"])
        assert row.scenario == scenario.name
        assert row.following == 1.0


def test_the_expert_is_the_measure_of_itself() -> None:
    scene = sample_scenes(scene_keys("test", np.arange(12)))
    for row in drive(None, scene, 5.0):
        assert row.progress == row.scene_score == 1.0
        assert row.scores["comfort"] > 0.9
        assert row.scores["distance_m"] >= 0


def test_few_scenes_are_not_filled_up_to_many() -> None:
    assert [frames_for("cuda", (288, 160), scenes).chunk for scenes in (1, 33, 200, 500)] == [16, 48, 208, 256]
    assert frames_for("cuda", (64, 32), 33).compiled
    assert (frames_for("cpu", (64, 32), 33).chunk, frames_for("cpu", (64, 32), 33).width) == (8, 64)


class Silent:
    """Never says anything that can be driven."""

    name = "silent"
    sees = False

    def begin(self) -> None: ...

    def plan(self, observation: Observation) -> Plans:
        nothing = torch.full((len(observation.speed), 1, 64), torch.nan)
        return Plans(
            nothing[..., None].expand(-1, -1, -1, 2), nothing, nothing, torch.zeros(len(nothing), dtype=torch.long)
        )


def test_without_plans_the_vehicle_stops_and_the_score_says_so() -> None:
    scene = scenes(Scenario.CRUISE)
    loop = ClosedLoop(scene)
    speed = loop.state.speed
    for _ in range(80):
        loop.publish(*Silent().plan(loop.observe()).driven())
        assert not loop.step().following.any()
    assert loop.state.speed.abs().max() < 1e-9
    rows = drive(Silent(), scene, 8.0)
    assert [row.following for row in rows] == [0.0] * len(rows)
    stopped = loop.tally.scores().distance_m
    assert torch.allclose(stopped, speed**2 / 4, atol=1.0)
    assert all(0 < row.progress < 0.8 for row in rows)


def one_other(place: Callable[[State], tuple[float, float]], kind: Kind = Kind.CAR) -> tuple[Scene, State]:
    """An ego on a straight road at 8 m/s, and one agent somewhere near it."""
    scene = scenes(Scenario.CUT_IN, 1)
    state = dataclasses.replace(first_state(scene), speed=torch.tensor([8.0], dtype=torch.float64))
    kinds = torch.zeros_like(scene.agents.kind)
    kinds[0, 0] = int(kind)
    agents = dataclasses.replace(scene.agents, kind=kinds)
    s, d = (torch.full_like(state.agent_s, value) for value in place(state))
    return dataclasses.replace(scene, agents=agents), dataclasses.replace(state, agent_s=s, agent_d=d)


def test_who_touches_whom() -> None:
    ahead, behind, beside = ((6.0, 0.0), (-3.0, 0.0), (1.0, 1.7))
    for place, name in ((ahead, "front"), (behind, "suffered"), (beside, "side")):
        scene, state = one_other(lambda _, place=place: place)
        touched = contacts(scene, state)
        assert [n for n in touched._fields if bool(getattr(touched, n))] == [name]
        standing = dataclasses.replace(state, speed=torch.zeros_like(state.speed))
        touched = contacts(scene, standing)
        assert [n for n in touched._fields if bool(getattr(touched, n))] == ["suffered"]
    scene, state = one_other(lambda _: beside, Kind.PEDESTRIAN)
    assert contacts(scene, state).pedestrian.all()
    scene, state = one_other(lambda _: (30.0, 0.0))
    assert not torch.stack(tuple(contacts(scene, state))).any()


def test_sides_are_at_fault_only_while_the_ego_leaves_its_lane() -> None:
    scene, state = one_other(lambda _: (1.0, 1.7))
    assert not bool(out_of_lane(scene, state))
    tally = Tally(scene, state)
    tally.add(state, state)
    scores = tally.scores()
    assert bool(scores.other_collision)
    assert not bool(scores.at_fault_collision)

    aside = dataclasses.replace(state, y=state.y + 1.0, d=state.d + 1.0)
    assert bool(out_of_lane(scene, aside))
    tally = Tally(scene, state)
    tally.add(state, aside)
    assert bool(tally.scores().at_fault_collision)


def test_only_the_first_collision_counts() -> None:
    scene, hit_from_behind = one_other(lambda _: (-3.0, 0.0))
    _, hits = one_other(lambda _: (6.0, 0.0))
    tally = Tally(scene, hit_from_behind)
    tally.add(hit_from_behind, hit_from_behind)
    tally.add(hit_from_behind, hits)
    scores = tally.scores()
    assert bool(scores.other_collision)
    assert not bool(scores.front_collision)
    assert not bool(scores.at_fault_collision)


def figures(**values: float) -> Scores:
    fields = {name: torch.zeros(1, dtype=torch.bool) for name in Scores._fields}
    fields |= {"distance_m": torch.tensor([100.0]), "comfort": torch.ones(1)}
    return Scores(**(fields | {name: torch.tensor([value]) for name, value in values.items()}))


@pytest.mark.parametrize(
    ("driven", "expert", "progress"), [(50.0, 100.0, 0.5), (130.0, 100.0, 1.0), (0.0, 3.0, 1.0), (-2.0, 50.0, 0.0)]
)
def test_progress_is_relative_to_the_expert(driven: float, expert: float, progress: float) -> None:
    assert float(figures(distance_m=driven).progress(figures(distance_m=expert))) == pytest.approx(progress)


@pytest.mark.parametrize(
    ("fault", "score"),
    [("at_fault_collision", 0.0), ("off_road", 0.0), ("red_light", 0.8), ("stop_sign", 0.8), ("other_collision", 0.8)],
)
def test_what_ends_a_drive(fault: str, score: float) -> None:
    scores = figures(distance_m=80.0)._replace(**{fault: torch.ones(1, dtype=torch.bool)})
    assert float(scores.scene_score(figures())) == pytest.approx(score)


def test_comfort_is_the_share_of_calm_time() -> None:
    scene, state = one_other(lambda _: (200.0, 0.0))

    def run(accels: list[float]) -> float:
        tally = Tally(scene, state)
        for accel in accels:
            tally.add(state, dataclasses.replace(state, accel=torch.full_like(state.accel, accel)))
        return float(tally.scores().comfort)

    assert run([0.5] * 20) == 1.0
    assert run([-5.0] * 20) == 0.0
    # Within the bounds, but the change from -2 to 2.3 in half a second is not.
    assert run([-2.0] * 10 + [2.3] * 10) == pytest.approx(0.75)


def test_history_and_pictures_are_those_of_the_drive(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scenes(Scenario.CURVE, 2)
    frames = FrameSettings(width=32, height=16, chunk=1)
    made = []

    def counting(scene: Scene, state: State, settings: FrameSettings) -> Tensor:
        made.append(float(state.time_s[0]))
        return render_frames(scene, state, settings)

    monkeypatch.setattr(closed_loop, "render_frames", counting)
    loop, episode = ClosedLoop(scene, frames), record(scene, 30)
    for step in range(15, 19):
        seen = loop.observe()
        xyz, rot = episode.history(step)
        assert torch.equal(seen.history_xyz, xyz)
        assert torch.equal(seen.history_rot, rot)
        assert seen.navigation == episode.navigation(step)
        assert seen.images is not None
        assert seen.images.shape == (2, 4, 4, 16, 32, 3)
        for frame in range(4):
            expected = render_frames(scene, episode.states[step - 3 + frame], frames)
            assert torch.equal(seen.images[:, :, frame], expected)
        loop.apply(None)
    # Four for the first window, one for each further one.
    assert len(made) == 4 + 3


def test_padded_chunks_show_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scenes(Scenario.SLOW_LEAD, 3)
    state = first_state(scene)
    whole = render_frames(scene, state, FrameSettings(width=32, height=16, chunk=3))
    monkeypatch.setattr(render, "_compiled_shade", render._shade)
    padded = render_frames(scene, state, FrameSettings(width=32, height=16, chunk=2, compiled=True))
    assert torch.equal(whole, padded)


def test_scenes_do_not_depend_on_their_batch_or_device_process() -> None:
    settings = RunSettings(split="validation", seconds=1.0, replan=2, batch=7)
    work = ClosedLoopWork(("constant-velocity", "expert"), PlainSettings("none"), settings)
    together = spread(work, range(4, 14), ["cpu"], "one")
    apart = spread(work, range(4, 14), ["cpu", "cpu"], "two")
    key = lambda item: (item[0], item[1].index)  # noqa: E731
    assert sorted(together, key=key) == sorted(apart, key=key)
    assert [row.index for name, row in together if name == "expert"] == list(range(4, 14))


@pytest.mark.parametrize(
    "values", [{"split": "dev"}, {"seconds": 0.0}, {"replan": 0}, {"replan": 11}, {"batch": 0}, {"policy_batch": 0}]
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(InputError, match="required, found"):
        RunSettings(**values)
