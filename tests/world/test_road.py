"""Positions on roads and back."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashdrive_node.world.road import chain, local_coordinates

BENDS = st.one_of(st.just(0.0), st.floats(-0.05, 0.05))


@settings(max_examples=60)
@example(lengths=[20.0] * 3, bends=[-6e-8, 0.0, 0.0, 0.0, 0.0], s=2.0, d=1.0)  # as good as straight
@example(lengths=[80.0] * 3, bends=[9e-7, 0.0, 0.0, 0.0, 0.0], s=59.0, d=0.0)
@given(
    lengths=st.lists(st.floats(20, 80), min_size=3, max_size=5),
    bends=st.lists(BENDS, min_size=5, max_size=5),
    s=st.floats(0, 59),
    d=st.floats(-8, 8),
)
def test_projection_inverts_position(lengths: list[float], bends: list[float], s: float, d: float) -> None:
    # Less than a right angle per piece and no bend tighter than the offset, so that the closest point is unique.
    bends = [max(-1.2 / n, min(1.2 / n, k)) for n, k in zip(lengths, bends, strict=False)]
    road = chain(np.array([lengths]), np.array([bends]), 0.0)
    at, aside = torch.tensor([[s]], dtype=torch.float64), torch.tensor([[d]], dtype=torch.float64)
    x, y, yaw = road.pose_at(at, aside)
    point = road.project(x, y, at)
    back = road.pose_at(point.s, point.d)
    assert torch.allclose(torch.stack(back[:2]), torch.stack((x, y)), atol=1e-7)
    assert point.d.abs().item() <= abs(d) + 1e-7
    if abs(point.s.item() - s) < 1e-6:
        assert abs(point.yaw.item() - yaw.item()) < 1e-6


@given(k=BENDS, s=st.floats(0.1, 20), d=st.floats(-5, 5))
def test_arcs_have_their_curvature(k: float, s: float, d: float) -> None:
    road = chain(np.array([[100.0]]), np.array([[k]]), 0.0)
    at = torch.tensor([[s, s + 1e-4]], dtype=torch.float64)
    yaw = road.pose_at(at, torch.zeros_like(at))[2][0]
    assert abs((yaw[1] - yaw[0]).item() / 1e-4 - (k if abs(k) > 1e-6 else 0.0)) < 1e-5
    forward, left, _ = (v[0, 0] for v in road.pose_at(at, torch.full_like(at, d)))
    found = local_coordinates(forward, left, torch.tensor(k, dtype=torch.float64))
    assert abs(found[0].item() - s) < 2e-3
    assert abs(found[1].item() - d) < 2e-3


def test_joints_are_smooth() -> None:
    road = chain(np.array([[30.0, 25.0, 40.0]]), np.array([[0.0, 0.04, -0.02]]), -10.0)
    s = torch.arange(-10, 84, 0.05, dtype=torch.float64)[None]
    x, y, yaw = road.pose_at(s, torch.zeros_like(s))
    steps = torch.sqrt(x.diff() ** 2 + y.diff() ** 2)
    assert (steps - 0.05).abs().max() < 1e-5
    assert yaw.diff().abs().max() < 0.05 * 0.0401
