"""The expert drives well, its labels are exact, and its causes are the scenarios' subjects."""

from __future__ import annotations

import numpy as np
import torch

from flashdrive_node.model.action_space import ActionSpace
from flashdrive_node.model.presets import alpamayo_1_5_10b
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import FUTURE, Episode
from flashdrive_node.world.faults import Faults, boxes_overlap, faults, no_faults
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, Scenario
from flashdrive_node.world.simulation import advance
from flashdrive_node.world.state import ACCEL_MAX, ACCEL_MIN, CURVATURE_MAX, first_state
from flashdrive_node.world.survey import sound_keys, survey


def test_faults_of_the_expert_are_rare_and_scenarios_show_their_subject() -> None:
    counts = survey("test", 570, 200)
    assert counts.scenes == 570
    for name, scenes in counts.faults.items():
        assert scenes <= 2, (name, scenes)
    for name, (scenes, shown) in counts.by_scenario.items():
        assert scenes > 10, name
        assert shown >= 0.5 * scenes, (name, scenes, shown)
    assert all(seconds > 1.0 for seconds in counts.cause_s.values()), counts.cause_s
    assert all(seconds > 1.0 for seconds in counts.manoeuvre_s.values()), counts.manoeuvre_s
    assert len(counts.rows()) > 40


def test_filtering_leaves_scenes_without_faults() -> None:
    keys = scene_keys("train", np.arange(40))
    kept = sound_keys(keys, 60)
    assert 30 <= len(kept) <= 40
    assert set(kept.tolist()) <= set(keys.tolist())


def test_labels_integrate_to_the_driven_path(episode: Episode) -> None:
    space = ActionSpace(alpamayo_1_5_10b().action_space)
    mean_a, std_a, mean_k, std_k = space.constants.double()
    for step in (episode.windows[0], episode.windows[-1]):
        driven = episode.actions(step)
        normalised = torch.stack(((driven[..., 0] - mean_a) / std_a, (driven[..., 1] - mean_k) / std_k), dim=-1)
        path = space.to_path(normalised.float(), episode.states[step].speed.float())
        xyz, rot = episode.future(step)
        assert (path.xyz - xyz).norm(dim=-1).max() < 5e-3
        assert (path.rot - rot).abs().max() < 1e-3
        assert space.within_bounds(path).all()


def test_history_gives_the_speed_at_t0(episode: Episode) -> None:
    space = ActionSpace(alpamayo_1_5_10b().action_space)
    step = episode.windows[10]
    history = episode.history(step)
    assert (history[0][:, -1]).abs().max() == 0
    estimated = space.initial_speed(*history)
    assert (estimated - episode.states[step].speed).abs().max() < 0.35


def test_actions_are_feasible_and_nobody_reverses(episode: Episode) -> None:
    for state, decision in zip(episode.states[1:], episode.decisions, strict=True):
        assert (state.speed >= -1e-9).all()
        assert (state.agent_speed >= 0).all()
        assert ((decision.accel >= ACCEL_MIN) & (decision.accel <= ACCEL_MAX)).all()
        assert (decision.curvature.abs() <= CURVATURE_MAX).all()
        assert (state.d.abs() < 6).all()


def test_recovery_leads_back_to_the_lane(episode: Episode) -> None:
    cruise = episode.scene.scenario == int(Scenario.CRUISE)
    scenes = len(episode.scene)
    step = episode.windows[20]
    side = torch.where(torch.arange(scenes) % 2 == 0, 0.7, -0.7).double()
    state, label = episode.recovery(step, side, -side * 0.1, torch.full((scenes,), 0.9, dtype=torch.float64))
    assert ((state.d - episode.states[step].d).abs()[cruise] > 0.6).all()
    assert label.actions.shape == (scenes, FUTURE, 2)
    end = label.poses[:, -1]
    point = episode.scene.road.project(end[:, :1], end[:, 1:2], state.s[:, None] + 60)
    assert (point.d[cruise].abs() < 0.15).all()
    # The label is what drives there: the same actions from the same state give the same poses.
    for i in range(FUTURE):
        state, _ = advance(episode.scene, state, label.actions[:, i])
    assert torch.equal(torch.stack((state.x, state.y, state.yaw, state.speed), dim=1), end)


def test_given_actions_are_driven_by_the_unicycle() -> None:
    scene = sample_scenes(scene_keys("train", range(8)), Scenario.CRUISE)
    state = first_state(scene)
    action = torch.tensor([[0.5, 0.01]], dtype=torch.float64).expand(8, 2)
    after, _ = advance(scene, state, action)
    assert torch.allclose(after.speed, state.speed + 0.5 * DT_S)
    assert torch.allclose(after.yaw, 0.01 * (state.speed * DT_S + 0.25 * DT_S**2))


def test_drives_repeat_and_do_not_depend_on_the_batch() -> None:
    keys = scene_keys("validation", range(30))
    whole, part = first_state(sample_scenes(keys)), first_state(sample_scenes(keys[7:9]))
    scenes = sample_scenes(keys), sample_scenes(keys[7:9])
    for _ in range(60):
        whole, _ = advance(scenes[0], whole)
        part, _ = advance(scenes[1], part)
    for name, value in vars(part).items():
        assert torch.allclose(vars(whole)[name][7:9].double(), value.double(), atol=1e-9), name


def test_boxes_overlap_when_they_do() -> None:
    def box(x: float, y: float, yaw: float) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor([v], dtype=torch.float64) for v in (x, y, yaw, 4.0, 2.0))

    assert boxes_overlap(box(0, 0, 0), box(3.9, 0, 0)).all()
    assert not boxes_overlap(box(0, 0, 0), box(4.1, 0, 0)).any()
    assert not boxes_overlap(box(0, 0, 0), box(0, 2.1, 0)).any()
    assert boxes_overlap(box(0, 0, 0), box(0, 2.9, np.pi / 2)).all()
    # Corners cross although neither middle is inside the other, and a gap that only a turned axis shows.
    assert boxes_overlap(box(0, 0, 0), box(2.6, 1.6, np.pi / 4)).all()
    assert not boxes_overlap(box(0, 0, 0), box(3.6, 2.3, np.pi / 4)).any()


def test_driving_blindly_goes_wrong_in_every_way() -> None:
    """The checks that the expert passes fail for somebody who keeps the speed and the heading."""
    scene = sample_scenes(scene_keys("test", np.arange(190)))
    state, wrong = first_state(scene), no_faults(scene)
    for _ in range(220):
        after, _ = advance(scene, state, torch.zeros(len(scene), 2, dtype=torch.float64))
        wrong = Faults(*(a | b for a, b in zip(wrong, faults(scene, state, after), strict=True)))
        state = after

    def share(fault: torch.Tensor, scenario: Scenario) -> float:
        return float(fault[scene.scenario == int(scenario)].double().mean())

    assert share(wrong.red_light, Scenario.RED_LIGHT) > 0.7
    assert share(wrong.stop_sign, Scenario.STOP_SIGN) > 0.9
    assert share(wrong.off_road, Scenario.CURVE) > 0.9
    assert share(wrong.off_road, Scenario.MERGE) > 0.6
    assert share(wrong.front_collision | wrong.off_road, Scenario.STOP_AND_GO) > 0.9  # the road may bend
    assert share(wrong.pedestrian, Scenario.PEDESTRIAN) > 0.1
    assert wrong.other_collision.any()
    assert wrong.any.double().mean() > 0.6
