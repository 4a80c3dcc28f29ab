"""Windows from drives of a policy, labelled by the expert."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from flashdrive_node.engine.batched_policy import Plan
from flashdrive_node.training.closed_loop_supply import ClosedLoopSupply, LoopSettings
from flashdrive_node.training.pictures import Photographer
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import HISTORY
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.simulation import rollout

SETTINGS = LoopSettings(first=0, stride=8, seed=0, steps=40, plans=4, expert=0.0)


class Stamps(Photographer):
    """Pictures that hold the time at which they were made."""

    def views(self, scene, state):
        count = len(scene)
        tenths = (10 * state.time_s).round()
        images = tenths.to(torch.uint8)[:, None, None, None, None].expand(count, 4, 160, 288, 3)
        blank = torch.zeros(count, 4, 5, 9)
        return images, blank.to(torch.int16), blank.half()


class Swerving:
    """Drives on with a bend to the left, and remembers what it was shown."""

    def __init__(self):
        self.shown = []

    def plan(self, images, xyz, rot, nav):
        self.shown.append((images[:, 0, :, 0, 0, 0].clone(), xyz))
        actions = torch.zeros(len(nav), 1, 64, 2)
        actions[..., 1] = 0.01
        return Plan([""] * len(nav), actions, xyz, xyz, xyz)


@pytest.fixture
def supply(scribe):
    used = []

    @contextmanager
    def weights():
        used.append("in")
        yield
        used.append("out")

    supply = ClosedLoopSupply(Swerving(), Stamps(batch=2, compiled=False), scribe, SETTINGS, weights)
    supply.used = used
    return supply


def test_samples_agree_with_the_drive(supply, windows):
    fresh = supply()
    assert supply.used == ["in", "out"]
    kept = 3  # 0.4 of 8 scenes, per plan
    assert fresh.nominal == 4 * kept
    assert 0 < len(fresh.samples.lengths) <= fresh.nominal
    assert len(supply.policy.shown) == 4
    for plan, (stamps, xyz) in enumerate(supply.policy.shown):
        now = HISTORY - 1 + 2 * plan
        assert stamps.tolist() == [[now - 3, now - 2, now - 1, now]] * 8
        assert xyz[:, -1].abs().max() == 0
    # Pictures of a sample are those of its own moment, whose history led there.
    stamps = fresh.samples.images[:, 0, :, 0, 0, 0].long()
    assert (stamps.diff(dim=1) == 1).all()
    assert set(stamps[:, -1].tolist()) <= {HISTORY - 1 + 2 * plan for plan in range(4)}
    # The policy swerves, the expert's way on comes back: the first curvatures are to the right.
    late = stamps[:, -1] >= HISTORY + 3
    assert fresh.samples.actions[late, :5, 1].mean() < -0.2


def test_the_policy_drives_what_it_planned(supply):
    supply()
    before = supply.states[-4]
    supply._advance(torch.tensor([[0.5, 0.02]], dtype=torch.float64).expand(8, -1))
    after, last = supply.states[-1], supply.states[-2]
    assert after.speed.allclose(last.speed + 0.05)
    assert (after.yaw - last.yaw).allclose(0.02 * last.speed * 0.1 + 0.02 * 0.5 * 0.005)
    assert (last.time_s > before.time_s).all()


def test_the_expert_drives_where_a_plan_is_not_finite(supply):
    supply()
    last = supply.states[-1]
    supply._advance(torch.full((8, 2), torch.nan, dtype=torch.float64))
    driven = rollout(supply.scene, last, 1)
    assert torch.equal(supply.states[-1].x, driven.poses[:, 0, 0])


def test_new_scenes_follow_when_a_drive_is_over(supply):
    supply()
    first = supply.scene.key.clone()
    assert torch.equal(first, sample_scenes(scene_keys("train", np.arange(8))).key)
    for _ in range(3):
        supply()
    assert torch.equal(supply.scene.key, sample_scenes(scene_keys("train", np.arange(8, 16))).key)
