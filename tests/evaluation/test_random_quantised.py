"""Random quantised layers: in their formats from the start, as large as those of a checkpoint, and measured alike."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from flashdrive_node.cli import benchmark as command
from flashdrive_node.cli.main import main
from flashdrive_node.evaluation.random_networks import random_drafter, random_model
from flashdrive_node.model.footprint import Precision, weight_bytes
from flashdrive_node.model.fp8 import Fp8Linear
from flashdrive_node.model.linear import QuantisedLinear
from flashdrive_node.model.paroquant import NEVER, ParoLinear
from flashdrive_node.model.precision import PRESETS, StagePrecision
from flashdrive_node.model.state_dict import release_slots
from support.narrow_release import small_alpamayo

CPU = torch.device("cpu")
CONFIG = small_alpamayo()


def drawn(stages: StagePrecision) -> nn.Module:
    return random_model(CONFIG, CPU, torch.float32, stages).model


@pytest.mark.parametrize("preset", ["bf16", "fp8", "w4a8", "w4a16"])
def test_what_is_kept_is_what_a_checkpoint_takes(preset: str) -> None:
    model = drawn(PRESETS[preset])
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    constants = model.action_space.constants.nbytes + model.expert.action_in_proj.frequencies.nbytes
    expected = weight_bytes(release_slots(CONFIG), Precision(preset, PRESETS[preset], 4))
    assert sum(tensor.nbytes for tensor in tensors) - constants == expected
    formats = Counter(module.format for module in model.modules() if isinstance(module, QuantisedLinear))
    # Of the text layers, o_proj alone has columns in groups of 128 at this width.
    assert formats[preset] == (CONFIG.text.num_layers if preset.startswith("w4") else formats["fp8"])
    assert formats["int8"] == (preset != "bf16")


def test_contents_are_of_the_plain_weights_size_and_repeat_themselves() -> None:
    model = drawn(PRESETS["w4a16"])
    layer = model.language.layers[0].o_proj
    assert isinstance(layer, ParoLinear)
    assert layer.int8_from == NEVER
    for quantised in (layer, model.expert.layers[0].qkv, model.language.lm_head):
        weight = quantised.dequantised()
        assert float(weight.mean().abs()) < 0.003
        assert 0.015 < float(weight.std()) < 0.025
    again = drawn(PRESETS["w4a16"])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True))
    assert not torch.equal(layer.codes, model.language.layers[1].o_proj.codes)


def test_static_scales_need_no_calibration_here() -> None:
    layer = drawn(StagePrecision(expert="fp8_static")).expert.layers[0].qkv
    assert isinstance(layer, Fp8Linear)
    assert layer.input_scale is not None


def test_drafter_in_its_stage_s_format() -> None:
    target = random_model(CONFIG, CPU, torch.float32).model
    drafter = random_drafter(target, stages=PRESETS["fp8"])
    assert isinstance(drafter.fc, Fp8Linear)
    assert isinstance(random_drafter(target).fc, nn.Linear)


def test_benchmark_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.DIMENSIONS, "10b", lambda: CONFIG)
    arguments = ["benchmark", "--dims", "10b", "--random-weights", "--precision", "w4a8", "--device", "cpu"]
    arguments += ["--image-size", "90x160", "--runs", "1", "--warm-up", "1", "--tokens", "2"]
    assert main([*arguments, "--samples", "1", "--configurations", "streaming", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["conditions"]["precision"] == "w4a8, the rest float32"
    assert report["load"]["weights_gib"] * 2**30 < 4 * 0.7 * sum(p.numel() for p in drawn(PRESETS["bf16"]).parameters())
