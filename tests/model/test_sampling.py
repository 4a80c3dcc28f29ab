"""Token choice equals transformers' logits warpers, and the drawn tokens follow the filtered distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.sampling import SamplingSettings, filter_logits, sample


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    temperature=st.floats(0.1, 3.0),
    top_p=st.floats(0.05, 1.0),
    top_k=st.none() | st.integers(1, 40),
)
def test_filter_equals_transformers(seed, temperature, top_p, top_k):
    logits = 3 * torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    logits[:, 7] = -torch.inf
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = filter_logits(logits, SamplingSettings(temperature, top_p, top_k))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -8.0]])
    settings = SamplingSettings(temperature=0.8, top_p=0.95)
    expected = filter_logits(logits, settings).softmax(-1)[0]
    draws = sample(logits.expand(20000, -1), settings, torch.Generator().manual_seed(0))
    found = torch.bincount(draws, minlength=5) / 20000
    # Four standard deviations of a share estimated from 20,000 draws.
    assert float((found - expected).abs().max()) < 4 * (0.25 / 20000) ** 0.5
    assert found[4] == 0


@pytest.mark.parametrize("greedy", [SamplingSettings(temperature=0.0), SamplingSettings(top_k=1)])
def test_greedy_takes_the_likeliest(greedy):
    logits = torch.randn(6, 50)
    assert torch.equal(sample(logits, greedy, None), logits.argmax(-1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 or more, found -1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, found nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"top_k": 0}, "top_k must be at least 1 or absent, found 0"),
        ({"max_length": 0}, "max_length must be at least 1, found 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SamplingSettings(**arguments)
