"""Updates against torch's own, and against what they are defined by."""

import pytest
import torch
from torch import nn

from flashdrive_node.training.optimiser import Optimiser, orthogonal


def problem() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 4), torch.randn(32, 6), torch.randn(32, 4)


def loss_of(layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.1 * (layer(x) - y).square().mean()  # gradients below the norm that is clipped


def test_ends_of_networks_are_updated_as_by_adamw():
    layer, x, y = problem()
    other = nn.Linear(6, 4)
    other.load_state_dict(layer.state_dict())
    ours = Optimiser([("heads.weight", layer.weight), ("heads.bias", layer.bias)], rate=1e-2)
    groups = [{"params": [other.weight], "weight_decay": 0.05}, {"params": [other.bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 120):
        for group in theirs.param_groups:
            group["lr"] = 1e-2 * min(1.0, step / 100)
        loss_of(layer, x, y).backward()
        norm, clock = ours.step(0.0)
        loss_of(other, x, y).backward()
        theirs.step()
        theirs.zero_grad()
    assert float(norm) < 1
    assert float(clock) == 0
    torch.testing.assert_close(layer.weight, other.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.bias, other.bias, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 16, 64), (1, 8, 8)])
def test_singular_values_come_close_to_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.max() < 1.3
    # All but directions that hardly exist.
    assert values.quantile(0.1) > 0.6
    # The directions stay.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (orthogonal(matrices) * (u @ v)).sum((1, 2)) / (
        orthogonal(matrices).norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2))
    )
    assert cosine.min() > 0.95


def test_matrices_inside_are_turned_by_a_set_amount():
    layer, x, y = problem()
    before = layer.weight.detach().clone()
    optimiser = Optimiser([("layers.0.weight", layer.weight)], rate=1e-3, matrix_rate=1e-2, decay=0.0)
    loss_of(layer, x, y).backward()
    optimiser.step(0.0)
    change = (before - layer.weight.detach()) / (1e-2 / 100)  # first of 100 steps of warm-up
    values = torch.linalg.svdvals(change) / (0.2 * 6**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_matrices_may_be_left_to_adam():
    layer, x, y = problem()
    before = layer.weight.detach().clone()
    named = [("layers.0.weight", layer.weight)]
    optimiser = Optimiser(named, rate=1e-3, matrix_rate=None, decay=0.0, warm_up=1)
    loss_of(layer, x, y).backward()
    signs = layer.weight.grad.sign()
    optimiser.step(0.0)
    torch.testing.assert_close(before - layer.weight.detach(), 1e-3 * signs, rtol=1e-2, atol=0)


def test_rate_falls_with_the_clock_and_large_gradients_are_clipped():
    layer, x, y = problem()
    steps = []
    for clock in (0.0, 0.5, 1.0):
        copy = nn.Linear(6, 4)
        copy.load_state_dict(layer.state_dict())
        optimiser = Optimiser([("heads.weight", copy.weight)], rate=1e-2, decay=0.0)
        (1e6 * loss_of(copy, x, y)).backward()
        norm, shared = optimiser.step(clock)
        assert float(norm) > 100
        assert float(shared) == clock
        steps.append(float((copy.weight - layer.weight).norm()))
    assert steps[1] == pytest.approx(0.51 * steps[0], rel=0.01)
    assert steps[2] == pytest.approx(0.02 * steps[0], rel=0.01)


def test_a_broken_gradient_changes_nothing():
    layer, x, y = problem()
    optimiser = Optimiser([("layers.weight", layer.weight), ("bias", layer.bias)], rate=1e-2, decay=0.0)
    before = layer.weight.detach().clone()
    (loss_of(layer, x, y) * float("nan")).backward()
    norm, _ = optimiser.step(0.0)
    assert not norm.isfinite()
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None
    loss_of(layer, x, y).backward()
    optimiser.step(0.0)
    assert not torch.equal(layer.weight, before)


def test_small_updates_of_bfloat16_weights_are_not_lost_and_are_averaged():
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimiser = Optimiser([("heads.weight", weight)], rate=1e-4, decay=0.0)
    seen = []
    for _ in range(300):
        weight.grad = torch.ones_like(weight)
        optimiser.step(0.0)
        seen.append(float(optimiser.master.mean()))
    # A step of 1e-4 is below what bfloat16 resolves at 1.
    assert seen[-1] == pytest.approx(1 - 1e-4 * (50.5 + 200), abs=1e-3)
    assert float(weight.float().mean()) == pytest.approx(seen[-1], abs=4e-3)
    with optimiser.averaged():
        averaged = float(weight.float().mean())
    assert float(weight.float().mean()) == pytest.approx(seen[-1], abs=4e-3)
    assert seen[-1] < float(optimiser.average.mean()) < 1
    assert averaged == pytest.approx(float(optimiser.average.mean()), abs=4e-3)
