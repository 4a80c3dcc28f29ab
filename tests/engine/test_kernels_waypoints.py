"""The action expert's projections in Triton against its modules in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.waypoints import embed_waypoints, project_velocity
from flashdrive_node.model.config import ActionInProjConfig
from flashdrive_node.model.expert import ActionInProj
from support.kernel_inputs import DEVICE, DTYPE, assert_close, draw, seeded

pytest.importorskip("triton", reason="the kernels need the triton package")

CASES = settings(max_examples=6, deadline=None)


def projection(random: torch.Generator, hidden: int, out_size: int, layers: int) -> ActionInProj:
    config = ActionInProjConfig(hidden_size=hidden, num_enc_layers=layers, num_fourier_feats=20, max_freq=100.0)
    module = ActionInProj(config, 2, out_size)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=random) * parameter.shape[-1] ** -0.5)
    return module.requires_grad_(False).to(DEVICE)


@CASES
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    hidden=st.sampled_from([20, 64, 70]),
    out_size=st.sampled_from([33, 64]),
    layers=st.integers(1, 2),
)
def test_waypoints_are_embedded_as_the_module_does(seed, rows, hidden, out_size, layers):
    from flashdrive_node.engine.kernels import triton_waypoints

    random = seeded(seed)
    module = projection(random, hidden, out_size, layers)
    x, t = torch.randn(rows, 2, generator=random).to(DEVICE), torch.rand(1, generator=random).to(DEVICE)
    found = triton_waypoints.embed_waypoints(x, module.time_part(t), module, torch.float32)
    with forced("triton"):
        rounded = embed_waypoints(x, module.time_part(t), module, DTYPE)
    exact = copy.deepcopy(module).double()(x.double(), t.double())
    # Angles of up to 100 turns are rounded in float32, by the modules too.
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-3)
    assert_close(rounded, exact, ulps=2.5)
    torch.testing.assert_close(module(x, t).double(), exact, rtol=0, atol=2e-3)


@CASES
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), size=st.integers(1, 300))
def test_velocities(seed, rows, size):
    random = seeded(seed)
    hidden, layer = draw(random, rows, size), nn.Linear(size, 2).requires_grad_(False).to(DEVICE)
    with forced("triton"):
        found = project_velocity(hidden, layer)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), copy.deepcopy(layer).double()(hidden.double()), rtol=0, atol=1e-5)


def test_bad_input_is_refused():
    module = projection(seeded(0), 20, 33, 1)
    part = torch.zeros(1, 20)
    with pytest.raises(ValueError, match=r"float32 x \[N, 2\] and time_part \[1, 20\] are required, found \[4, 3\]"):
        embed_waypoints(torch.zeros(4, 3), part, module, DTYPE)
    with pytest.raises(ValueError, match=r"hidden states \[N, 6\] are required, found \[4, 7\]"):
        project_velocity(torch.zeros(4, 7), nn.Linear(6, 2))
