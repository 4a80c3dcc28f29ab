"""The losses against what they are defined by, and that a model learns from them."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from flashdrive_node.model import batched
from flashdrive_node.training import losses as module
from flashdrive_node.training.losses import WEIGHTS, AuxiliaryHeads, losses, total
from flashdrive_node.training.optimiser import Optimiser
from training.conftest import noisy_pictures


@pytest.fixture
def batch(scribe, windows):
    return scribe.write(windows.rows(torch.arange(3)), noisy_pictures(3))


@pytest.fixture
def heads(model):
    return AuxiliaryHeads(model.config)


def of(model, heads, batch, scribe, draws=2):
    return losses(model, heads, batch, scribe.layout, draws, torch.Generator().manual_seed(0))


def test_text_loss_is_that_of_the_answers_tokens(model, heads, batch, scribe):
    features = batched.encode_images(model, batch.images)
    positions = scribe.layout.positions(scribe.width)
    hidden, _, _ = batched.prefill(model, batch.ids, positions, features, scribe.layout.image_index)
    expected = []
    for row in range(3):
        first, last = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        logits = model.language.logits(hidden[row, first - 1 : last - 1])
        expected.append(cross_entropy(logits, batch.ids[row, first:last], reduction="none"))
    torch.testing.assert_close(of(model, heads, batch, scribe)["text"], torch.cat(expected).mean())


def test_flow_losses_are_least_for_the_right_velocity(model, heads, batch, scribe, monkeypatch):
    def perfect(model, context, samples):
        # What stands between x and the action, over the time that is left.
        return lambda x, t: (batch.actions[:, None] - x) / (1 - t[..., None, None])

    monkeypatch.setattr(module.batched, "velocity_field", perfect)
    parts = of(model, heads, batch, scribe)
    assert parts["flow"] < 1e-6
    assert parts["path"] < 1e-5

    # An error of one everywhere: its sums grow along the path.
    monkeypatch.setattr(module.batched, "velocity_field", lambda *args: lambda x, t: perfect(*args)(x, t) + 1)
    parts = of(model, heads, batch, scribe)
    assert float(parts["flow"]) == pytest.approx(1, rel=1e-3)
    sums = torch.arange(1, 65.0) / 8
    assert float(parts["path"]) == pytest.approx(float(sums.square().mean()), rel=1e-3)


def test_read_outs_of_nothing_know_nothing(model, heads, batch, scribe):
    parts = of(model, heads, batch, scribe)
    assert parts.keys() == WEIGHTS.keys()
    logarithms = torch.tensor([13.0, 4, 6, 3]).log().mean()
    assert float(parts["decision"]) == pytest.approx(float(logarithms), rel=1e-4)
    assert float(parts["seen"]) == pytest.approx(float(parts["understood"]), rel=1e-5)
    expected = sum(WEIGHTS[name] * float(value) for name, value in parts.items())
    assert float(total(parts)) == pytest.approx(expected, rel=1e-5)


def test_unknown_geometry_does_not_count(model, heads, batch, scribe):
    before = of(model, heads, batch, scribe)["geometry"]
    changed = torch.where(batch.geometry_known > 0, batch.geometry, 99.0)
    assert of(model, heads, batch._replace(geometry=changed), scribe)["geometry"] == before


def test_every_parameter_learns_and_the_loss_falls(model, heads, batch, scribe):
    ends = ((f"heads.{name}", parameter) for name, parameter in heads.named_parameters())
    optimiser = Optimiser([*model.named_parameters(), *ends], rate=3e-3)
    first = [p.detach().clone() for p in optimiser.parameters]
    values = []
    for _ in range(12):
        parts = of(model, heads, batch, scribe)
        total(parts).backward()
        optimiser.step(0.0)
        values.append({name: float(value) for name, value in parts.items()})
    assert all(values[-1][name] < values[0][name] for name in ("text", "decision", "seen", "understood"))
    unchanged = [
        name
        for (name, p), old in zip([*model.named_parameters(), *heads.named_parameters()], first, strict=True)
        if torch.equal(p, old)
    ]
    assert unchanged == []
