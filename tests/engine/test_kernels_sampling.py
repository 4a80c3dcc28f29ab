"""Drawing without a sort: the nucleus and the winner, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.sampling import draw
from flashdrive_node.model.sampling import SamplingSettings
from support.kernel_inputs import DEVICE, DTYPE, integers, seeded
from support.kernel_inputs import draw as normal

pytest.importorskip("triton", reason="the kernels need the triton package")


def assert_winner(found: Tensor, logits: Tensor, rule: SamplingSettings, noise: Tensor) -> None:
    """The token wins the race among all that belong to the nucleus, within the rounding of float32 sums."""
    scaled = logits.double() / rule.temperature
    probability = scaled.softmax(dim=1)
    for row, token in enumerate(found.tolist()):
        value, p = scaled[row], probability[row]
        levels, level = value.unique(return_inverse=True)
        at_level = torch.zeros_like(levels).index_add_(0, level, p)
        below = at_level.cumsum(0)[level]  # with all that are equally likely
        score = value - noise[row].double().log()
        surely = (below > 1 - rule.top_p + 1e-5) | (value == value.max())
        assert below[token] > 1 - rule.top_p - 1e-5 or value[token] == value.max()
        assert score[token] >= score[surely].max() - 1e-3


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    size=st.sampled_from([1, 2, 40, 700, 4097]),
    spread=st.sampled_from([0.0, 0.3, 3.0, 20.0]),
    top_p=st.sampled_from([1e-8, 0.3, 0.9, 0.98, 1.0]),
    temperature=st.sampled_from([0.3, 0.6, 1.5]),
    forbidden=st.booleans(),
)
def test_the_winner_is_of_the_nucleus(seed, rows, size, spread, top_p, temperature, forbidden):
    random = seeded(seed)
    logits = normal(random, rows, size) * spread
    if forbidden:
        logits[:, : size // 2] = -torch.inf
    noise = torch.empty(rows, size).exponential_(generator=random).to(DEVICE)
    rule = SamplingSettings(temperature, top_p)
    with forced("triton"):
        found = draw(logits, rule, noise)
    assert found.dtype == torch.int64
    assert_winner(found, logits, rule, noise)


def test_both_forms_draw_the_same_where_logits_differ():
    """Distinct numbers: no ties at the edge of the nucleus."""
    random = seeded(5)
    logits = (torch.randperm(600, generator=random) / 100).to(DEVICE, torch.float16)[None].repeat(12, 1)
    assert len(logits[0].unique()) > 550
    noise = torch.empty(12, 600).exponential_(generator=random).to(DEVICE)
    drawn = []
    for backend in ("triton", "reference"):
        with forced(backend):
            drawn.append(draw(logits, SamplingSettings(0.6, 0.9), noise))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) > 5


def test_greedy_needs_no_noise():
    logits = normal(seeded(1), 4, 50)
    assert torch.equal(draw(logits, SamplingSettings(temperature=0.0), None), logits.argmax(dim=1))


def test_top_k_goes_through_the_reference():
    logits, noise = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1e-9, 1.0, 1e-9]])
    with forced("triton"):
        found = draw(logits.to(DEVICE, DTYPE), SamplingSettings(1.0, 1.0, top_k=2), noise.to(DEVICE))
    assert torch.equal(found, integers([2]))


def test_missing_noise_is_an_error():
    with pytest.raises(ValueError, match=r"noise of the logits' shape \[2, 3\] is required, found \[2, 4\]"):
        draw(torch.zeros(2, 3), SamplingSettings(), torch.ones(2, 4))
