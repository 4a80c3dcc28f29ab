"""Disturbed drives and the windows chosen from them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flashdrive_node.training.assessment import stated
from flashdrive_node.training.drives import (
    Disturbance,
    DriveJob,
    at,
    choose,
    disturbance_of,
    disturbed_drive,
    windows_of,
)
from flashdrive_node.training.source import WindowSource
from flashdrive_node.training.windows import Windows, geometry, join, map_leaves
from flashdrive_node.world.decision_text import parse
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import HISTORY, record
from flashdrive_node.world.reasoning import ONSET_STEPS
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import DT_S, Scenario
from flashdrive_node.world.simulation import rollout

CALM = Disturbance(share=0.0)


def leaves(windows: Windows) -> list:
    found: list = []
    map_leaves(windows, lambda t: found.append(t) or t)
    return found


def test_a_job_gives_the_same_windows_every_time_and_anywhere():
    job = DriveJob("train", 7, 6, 8, seed=1, steps=40)
    here = windows_of(job)
    source = WindowSource(job, workers=1)
    try:
        there, later = next(source), next(source)
    finally:
        source.close()
    assert all(torch.equal(a, b) for a, b in zip(leaves(here), leaves(there), strict=True))
    assert here.sentences == there.sentences
    assert here.navigation == there.navigation
    # The next job, and the ranks, drive other scenes.
    assert not set(later.scene.key.tolist()) & set(there.scene.key.tolist())
    other = next(WindowSource(job, workers=0, rank=1, ranks=2))
    assert torch.equal(other.scene.key.unique(), later.scene.key.unique())


def test_labels_are_what_the_expert_does_from_there(windows):
    now = windows.frames[-1]
    driven = rollout(windows.scene, now, 64)
    torch.testing.assert_close(windows.actions, driven.actions.float())
    # Frames and history end at the same moment and lead there.
    assert (now.time_s - windows.frames[0].time_s).allclose(torch.tensor(3 * DT_S, dtype=torch.float64))
    assert windows.history_xyz[:, -1].abs().max() == 0
    moved = windows.history_xyz[:, -2, :2].norm(dim=1)
    before = windows.frames[-2]
    torch.testing.assert_close(moved, torch.hypot(now.x - before.x, now.y - before.y).float(), atol=1e-4, rtol=1e-4)


def test_sentences_state_the_decision(windows):
    for sentence, decision in zip(windows.sentences, windows.decision.tolist(), strict=True):
        assert parse(sentence) == stated(decision)


def test_undisturbed_drives_are_the_experts(windows):
    scene = sample_scenes(scene_keys("train", range(4)))
    drive = disturbed_drive(scene, 30, CALM, np.random.default_rng(0))
    episode = record(scene, 30)
    assert torch.equal(drive.states.x[30], episode.states[30].x)
    assert torch.equal(drive.decisions.cause[29], episode.decisions[29].cause)
    assert drive.sound.all()


def test_disturbances_leave_the_line_and_come_in_bursts():
    push = disturbance_of(400, 200, Disturbance(), np.random.default_rng(0))
    active = (push != 0).any(dim=2)
    disturbed = active.any(dim=0)
    assert 0.5 < disturbed.float().mean() < 0.8
    share = active[:, disturbed].float().mean()
    assert 0.3 < share < 0.5  # bursts of 1.6 s, calm of 2.4 s
    assert push[..., 0][active].std() == pytest.approx(1.6, rel=0.1)
    scene = sample_scenes(scene_keys("train", range(40)), Scenario.CRUISE)
    offsets = [
        disturbed_drive(scene, 60, settings, np.random.default_rng(0)).states.d.abs().max()
        for settings in (CALM, Disturbance(share=1.0))
    ]
    assert offsets[0] < 0.1
    assert 0.4 < offsets[1] < 3.0


def test_rare_decisions_are_chosen_more_often():
    scene = sample_scenes(scene_keys("train", range(60)))
    drive = disturbed_drive(scene, 70, CALM, np.random.default_rng(0))
    kinds = []
    for balance in (0.0, 0.8):
        step, row = choose(drive, 150, balance, np.random.default_rng(0))
        assert step.min() >= HISTORY - 1
        assert step.max() < 70 - ONSET_STEPS
        moment = at(drive.states, step, row)
        assert torch.equal(moment.x, drive.states.x[step, row])
        cause = drive.decisions.cause[step, row]
        kinds.append((cause == 0).float().mean())
    assert kinds[1] < 0.8 * kinds[0]


def test_windows_can_be_chosen_and_joined(windows):
    rows = torch.tensor([3, 0, 5])
    some = windows.rows(rows)
    assert some.sentences == tuple(windows.sentences[i] for i in (3, 0, 5))
    assert torch.equal(some.frames[0].x, windows.frames[0].x[rows])
    both = join(some, windows.rows(torch.tensor([1])))
    assert len(both) == 4
    assert both.sentences[3] == windows.sentences[1]
    assert torch.equal(both.scene.agents.s0[3], windows.scene.agents.s0[1])
    assert len(windows.rows(rows[:0])) == 0


def test_geometry_measures_the_road_and_what_is_ahead():
    scene = sample_scenes(scene_keys("train", range(30)), Scenario.BRAKING_LEAD)
    state = record(scene, 1).states[0]
    shifted = replace(state, d=state.d + 0.4, yaw=state.yaw + 0.02)
    values, known = geometry(scene, shifted)
    torch.testing.assert_close(values[:, 0], torch.full((30,), 0.4))
    torch.testing.assert_close(values[:, 1], torch.full((30,), 0.2), atol=1e-4, rtol=0)
    assert known[:, 5].mean() > 0.9  # a vehicle ahead is what the scenario is about
    rows = known[:, 5] > 0
    gap = scene.agents.s0[:, 0] - 0.5 * scene.agents.length[:, 0] - state.front_s
    torch.testing.assert_close(values[rows, 5].expm1(), gap.float()[rows], atol=1e-3, rtol=1e-3)
