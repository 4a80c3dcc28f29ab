"""Passes of a stack and the action stage made of kernels, against the same made of their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flashdrive_node.engine.flow_pass import FlowPass, SampledTexts, WaypointContext
from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.engine.kernels import triton_linear
from flashdrive_node.engine.kernels.attention import attend_visible
from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.visibility import up_to
from flashdrive_node.engine.slot_pass import run_at_slots
from flashdrive_node.model.inference import Context
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.rope import mrope_cos_sin
from support.kernel_inputs import DEVICE, DTYPE, draw, seeded
from support.small_models import random_model, small_config

pytest.importorskip("triton", reason="the kernels need the triton package")

#: Wide enough for products whose K is split, and heads that the kernels take.
CONFIG = small_config(
    layers=1,
    deepstack=[0],
    text_hidden=528,
    text_inter=520,
    expert_hidden=528,
    expert_inter=520,
    expert_heads=4,
    waypoints=5,
)
MODEL = random_model(CONFIG, 0, DTYPE).to(DEVICE).requires_grad_(False)
# Features of high frequencies make a turn of what rounding changes from one evaluation to the next.
MODEL.expert.action_in_proj.frequencies.clamp_(max=0.1)
PREFIX, SLOTS = 20, 50


def cache() -> KVCache:
    """A prompt's keys and values, and NaN behind."""
    made, random = KVCache(CONFIG.text, SLOTS, DEVICE, DTYPE), seeded(1)
    for tensor in (made.keys, made.values):
        tensor.fill_(torch.nan)
        tensor[:, :, : PREFIX + 14] = draw(random, *tensor[:, :, : PREFIX + 14].shape)
    return made


def assert_near(found: Tensor, expected: Tensor, share: float) -> None:
    """Within a share of the expected numbers' size."""
    distance = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert distance < share  # NaN does not pass


def test_these_products_are_split() -> None:
    assert triton_linear.tiling(5, 528, 4 * 16 + 2 * 2 * 16, 132).splits > 1


@pytest.mark.parametrize("samples", [1, 2])
def test_action_stage(samples: int) -> None:
    results = []
    for backend in ("triton", "reference"):
        kept = cache()
        with torch.inference_mode(), forced(backend):  # type: ignore[arg-type]
            waypoints = WaypointContext(MODEL, kept, samples)
            spans = ((PREFIX, 3), (PREFIX + 7, 6))[:samples]
            waypoints.place(Context(kept, PREFIX, -4), SampledTexts(spans, (3, 6)[:samples], PREFIX + 14))
            flow = FlowPass(MODEL, samples, FlowSchedule.parse("4:0,2:linear").table(DEVICE))
            noise = torch.randn(samples, 5, 2, generator=seeded(2)).to(DEVICE)
            flow.start(waypoints, noise, 8.0, 0.5)
            results.append(flow.finish())
    # The error estimate is a difference of two velocities: in bfloat16 rounding alone moves it by up to 0.02, and the
    # path by 0.0005 (against float32, 64 runs), on each of the two sides.
    for found, expected, share in zip(*results, (0.005, 0.02 if DEVICE.type == "cpu" else 0.04), strict=True):
        assert_near(found, expected, share)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("wanted", [0, 2])
def test_the_last_layer_runs_for_wanted_tokens_alone(backend: str, wanted: int) -> None:
    language, random, tokens = MODEL.language, seeded(3), 5
    x = draw(random, tokens, CONFIG.text.hidden_size)
    slots = torch.arange(tokens, device=DEVICE) + PREFIX
    rotation = mrope_cos_sin(slots.expand(3, -1), CONFIG.text, DTYPE)

    def run(kept: KVCache, count: int | None) -> Tensor:
        def attention(q: Tensor, keys: Tensor, values: Tensor, _: nn.Module) -> Tensor:
            return attend_visible(q, keys, values, up_to(slots[tokens - len(q) :] + 1))

        return run_at_slots(language.layers, language.norm, x, rotation, slots, kept, attention, wanted=count)

    whole, part = cache(), cache()
    with torch.inference_mode(), forced(backend):  # type: ignore[arg-type]
        expected, found = run(whole, None), run(part, wanted)
    assert expected.shape == (tokens, CONFIG.text.hidden_size)
    assert found.shape == (wanted, CONFIG.text.hidden_size)
    if wanted:
        assert_near(found, expected[tokens - wanted :], 1e-3)
    for a, b in ((part.keys, whole.keys), (part.values, whole.values)):
        assert torch.equal(a[:, :, : PREFIX + tokens], b[:, :, : PREFIX + tokens])
