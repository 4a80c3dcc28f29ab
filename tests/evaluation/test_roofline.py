"""The floors of stages: by hand on a small architecture, and as published figures have them on the release's."""

from dataclasses import replace

import pytest
import torch

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.evaluation.random_networks import release_drafter_config
from flashdrive_node.evaluation.roofline import (
    Ceilings,
    Floor,
    Operator,
    Workload,
    decoder_pass,
    decoder_weights,
    measure_ceilings,
    stage_floors,
    stage_operators,
    vision_pass,
)
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.precision import PRESETS, StagePrecision
from flashdrive_node.model.presets import alpamayo_1_5_10b
from support.small_models import small_config

#: Of one H200: bf16 matmul 796 TFLOP/s, device copy 4.25 TB/s (read + write).
H200 = Ceilings(796e12, 4.25e12, 50e9)
#: 4 new frames of 1080p, 16 tokens in 3 rounds, 4 flow evaluations.
STREAMING = Workload(
    samples=1,
    frame_bytes=4 * 1080 * 1920 * 3,
    patches=(720,) * 4,
    prompt_tokens=3086,
    computed_tokens=818,
    prefill_pairs=818 * 2000,
    tokens=16,
    evaluations=4,
    rounds=3,
)


def test_floor_on_an_h200_is_the_known_one():
    """Encode 4, prefill 16, decode 12, action 5, together 37 ms in bfloat16 (arithmetic of another hand)."""
    config = alpamayo_1_5_10b()
    floors = stage_floors(config, STREAMING, 2, H200, release_drafter_config(config))
    known = {"encode": 4, "prefill": 16, "decode": 12, "action": 5}
    assert {stage: floors[stage].ms for stage in known} == pytest.approx(known, abs=0.75)
    assert floors["total"].ms - floors["images"].ms == pytest.approx(37, abs=0.75)
    assert floors["images"].ms == pytest.approx(24.88 / 50, abs=0.01)
    for field in ("bytes", "flops", "ms"):
        stages = (getattr(floors[stage], field) for stage in (*known, "images"))
        assert getattr(floors["total"], field) == pytest.approx(sum(stages))


def test_floors_of_the_presets():
    """8 bits halve what weights take, 4 bits quarter it; keys, values and attention stay as they are."""
    config = alpamayo_1_5_10b()
    drafter = release_drafter_config(config)
    floors = {name: stage_floors(config, STREAMING, 2, H200, drafter, stages) for name, stages in PRESETS.items()}
    assert floors["bf16"] == stage_floors(config, STREAMING, 2, H200, drafter)
    total = {name: found["total"].ms for name, found in floors.items()}
    assert total["bf16"] > total["w4a16"] > total["fp8"] > total["w4a8"]
    # 8-bit prefill and 4-bit decoding with the rest in bfloat16: 22 ms, by arithmetic of another hand.
    text = StagePrecision.parse("prefill=w4a8,decode=w4a8,lm_head=int8,drafter=fp8")
    alone = stage_floors(config, STREAMING, 2, H200, drafter, text)
    assert alone["total"].ms - alone["images"].ms == pytest.approx(22, abs=1.3)
    assert [alone[stage] for stage in ("encode", "action")] == [floors["bf16"][stage] for stage in ("encode", "action")]
    # Three rounds of 6.95 G weights and two passes of a head of 0.64 G.
    least = 3 * (6.946e9 * (0.5 + 3 / 128) + 2 * 0.638e9) / 4.25e9
    assert least < floors["w4a8"]["decode"].ms < 1.25 * least


def test_a_round_beats_as_many_tokens_one_by_one():
    config = alpamayo_1_5_10b()
    one_by_one = stage_floors(config, replace(STREAMING, rounds=None), 2, H200)
    # 16 passes over 6.95 G weights, and 15 over the output head of 0.64 G.
    assert one_by_one["decode"].ms == pytest.approx((16 * 13.89e9 + 15 * 1.2755e9) / 4.25e9, rel=0.05)
    with pytest.raises(ValueError, match="a drafter is required"):
        stage_floors(config, STREAMING, 2, H200)


def test_a_draft_vocabulary_spares_the_output_head():
    config, drafter = alpamayo_1_5_10b(), release_drafter_config(alpamayo_1_5_10b())
    whole, reduced = (
        stage_floors(config, replace(STREAMING, draft_vocabulary=count), 2, H200, drafter)["decode"]
        for count in (None, 16_384)
    )
    spared = (config.tokens.vocab_size - 16_384) * config.text.hidden_size
    assert STREAMING.rounds is not None
    assert whole.bytes - reduced.bytes == STREAMING.rounds * 2 * spared


def test_matrices_are_those_of_the_modules():
    """Elements that passes count, against the parameters that have two dimensions."""
    config = small_config()
    model = Alpamayo.on_meta(config, torch.float32)

    def matrices(module: torch.nn.Module, *without: str) -> int:
        return sum(
            p.numel() for name, p in module.named_parameters() if p.ndim > 1 and not any(w in name for w in without)
        )

    assert decoder_weights(config.text) == matrices(model.language.layers)
    assert decoder_weights(config.expert) == matrices(model.expert.layers)
    weights = sum(o.bytes for o in vision_pass(config.vision, (16,), 1))
    assert weights == matrices(model.vision, "pos_embed")
    head = stage_operators(config, replace(STREAMING, rounds=None), 1)["prefill"][-1]
    assert head.bytes == model.language.lm_head.weight.numel()
    drafter = release_drafter_config(config)
    with torch.device("meta"):
        published = Drafter(release_drafter_config(alpamayo_1_5_10b()))
        guesses = matrices(Drafter(drafter))
    assert sum(p.numel() for p in published.parameters()) == 469_787_136
    no_head = [o for o in stage_operators(config, replace(STREAMING, rounds=1), 1, drafter)["decode"] if o != head]
    # fc, the drafter's layers, its attention without a cache; then the model's layers and the two heads.
    assert no_head[0].bytes + no_head[1].bytes == guesses
    assert no_head[2].bytes == 0


def test_passes_by_hand():
    # 3 layers, hidden 32, 4 heads and 2 key heads of 16, MLP 48: q 64, k and v 32 each, so per layer
    # 32 x 64 + 2 x 32 x 32 + 64 x 32 + 3 x 32 x 48 = 10,752 weights, 32,256 in all.
    config = small_config()
    matrices, attention = decoder_pass(config.text, tokens=5, pairs=50, slots=12, item_bytes=2)
    assert matrices == Operator(64_512, 322_560)
    # 12 slots x 2 x 32 x 3 layers x 2 bytes; 50 pairs x (score + mix) x 2 x 64 x 3 layers.
    assert attention == Operator(4_608, 38_400)
    # Two images of 16 patches: 3 blocks of 32 x (4 x 32 + 2 x 40), patches of 3 x 2 x 16 x 16 values; every patch
    # attends to 16; three mergers of 128 x (128 + 32) on a quarter of the rows.
    blocks, seen, mergers = vision_pass(config.vision, (16, 16), item_bytes=4)
    assert blocks == Operator(4 * (19_968 + 49_152), 2 * 32 * 69_120, stage="vision")
    assert seen == Operator(0, 4 * 2 * 256 * 32 * 3)
    assert mergers == Operator(4 * 61_440, 2 * 8 * 61_440, stage="vision")


def test_samples_share_weights_and_prefix():
    config = small_config()
    one = stage_operators(config, replace(STREAMING, rounds=None), 2)
    six = stage_operators(config, replace(STREAMING, rounds=None, samples=6), 2)
    assert one["prefill"] == six["prefill"]
    for stage in ("decode", "action"):
        assert [a.bytes for a in one[stage][::2]] == [b.bytes for b in six[stage][::2]]
        assert sum(b.flops for b in six[stage]) == pytest.approx(6 * sum(a.flops for a in one[stage]))
    layers = one["decode"][1], six["decode"][1]
    own = 2 * config.text.kv_size * config.text.num_layers * 2
    assert (layers[0].bytes, layers[1].bytes) == (3087 * own, 3092 * own)


def test_the_longer_of_two_times_counts():
    ceilings = Ceilings(flops_per_s=1e12, bytes_per_s=1e9, upload_bytes_per_s=1e8)
    assert ceilings.time_s(Operator(2e9, 1e12)) == 2
    assert ceilings.time_s(Operator(2e9, 3e12)) == 3
    assert ceilings.time_s(Operator(2e8, upload=True)) == 2
    floor = Floor.of([Operator(2e9, 1e12), Operator(2e9, 3e12)], ceilings)
    assert floor == Floor(4e9, 4e12, 5000)


def test_ceilings_of_this_machine():
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e9 < found.flops_per_s < 1e14
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.upload_bytes_per_s < 1e13
