"""The driver without eyes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flashdrive_node.evaluation.history_baseline import HistoryBaseline, load_history_baseline, route_features
from flashdrive_node.model.errors import CheckpointError


@pytest.fixture
def baseline(model):
    torch.manual_seed(0)
    return HistoryBaseline(model.config.action_space, hidden=32)


def test_file_gives_back_what_was_saved(baseline, windows, tmp_path):
    path = tmp_path / "baseline.safetensors"
    baseline.save(path)
    loaded = load_history_baseline(path)
    inputs = windows.history_xyz, windows.history_rot, windows.navigation
    assert torch.equal(loaded.plan(*inputs).xyz, baseline.plan(*inputs).xyz.detach())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_other_files_are_refused(baseline, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="history baseline"):
        load_history_baseline(path)
    path.write_text(json.dumps({"no": "tensors"}))
    with pytest.raises(CheckpointError, match="history baseline"):
        load_history_baseline(path)


def test_it_learns_to_drive_on(baseline, windows, model):
    space = model.action_space
    speed = space.initial_speed(windows.history_xyz, windows.history_rot)
    mean, std = space.constants[0::2], space.constants[1::2]
    actions = (windows.actions - mean) / std
    route = route_features(windows.navigation)
    optimiser = torch.optim.AdamW(baseline.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        loss = baseline.loss(windows.history_xyz, windows.history_rot, route, speed, actions)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        values.append(float(loss))
    assert values[-1] < 0.7 * values[0]
    # The loss is the mean distance of the paths, but for the small share of the actions.
    planned = baseline.plan(windows.history_xyz, windows.history_rot, windows.navigation)
    driven = space.to_path(actions, speed)
    distance = float((planned.xyz - driven.xyz).norm(dim=-1).mean().detach())
    assert values[-1] == pytest.approx(distance, rel=0.3)
