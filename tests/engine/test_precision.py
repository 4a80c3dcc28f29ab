"""What "auto" stands for, and what the settings make of a precision's name."""

from pathlib import Path

import pytest
import torch

from flashdrive_node.engine.drafter import load_drafter
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.precision import automatic, choose
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.fp8 import Fp8Linear
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.precision import PRESETS, StagePrecision
from flashdrive_node.model.presets import alpamayo_1_5_10b
from support.checkpoints import BUNDLED
from support.small_models import random_model, small_config

GIB = 2**30


@pytest.mark.parametrize(
    ("memory_gib", "samples", "preset", "said"),
    [
        (139, 1, "bf16", "bf16 takes 21.1"),
        (32, 6, "bf16", "bf16 takes"),
        (24, 1, "fp8", "fp8 11."),
        (12, 1, "fp8", "'flashdrive quantize' makes a checkpoint that takes 8."),
    ],
)
def test_least_rounding_that_fits(memory_gib: int, samples: int, preset: str, said: str) -> None:
    choice = choose(alpamayo_1_5_10b(), memory_gib * GIB, samples)
    assert choice.stages == PRESETS[preset]
    assert choice.reason.startswith(preset)
    assert said in choice.reason


def test_elsewhere_the_checkpoint_decides() -> None:
    assert automatic(BUNDLED, torch.device("cpu"), 1).stages is None


def test_names_of_settings() -> None:
    assert PlainSettings("x", precision="fp8").stages == PRESETS["fp8"]
    assert PlainSettings("x", precision="fp8", device="cpu").dtype == torch.float32
    assert PlainSettings("x", precision="float32").stages is None
    stages = PlainSettings("x", precision="prefill=w4a8,decode=w4a16,lm_head=int8").stages
    assert stages == StagePrecision(prefill="w4a8", decode="w4a16", lm_head="int8")
    with pytest.raises(InputError, match=r"one of auto, float32, bfloat16, bf16, fp8.*found 'int3'"):
        PlainSettings("x", precision="int3")


def test_engine_says_what_it_runs_in() -> None:
    engine = PlainEngine(PlainSettings(str(BUNDLED), device="cpu", precision="fp8", image_size=(160, 288)))
    assert engine.load().precision == "float32, fp8"
    assert engine.loaded is not None
    assert isinstance(engine.loaded.model.language.layers[0].qkv, Fp8Linear)
    engine.warm_up()


def test_drafter_in_eight_bits() -> None:
    directory, target = Path(__file__).parents[1] / "data" / "dflash_small", small_config(layers=5)
    plain = load_drafter(directory, target, "cpu", torch.float32)
    drafter = load_drafter(directory, target, "cpu", torch.float32, PRESETS["fp8"])
    assert isinstance(drafter.fc, Fp8Linear)
    assert isinstance(drafter.layers[0].qkv, Fp8Linear)
    generator = torch.Generator().manual_seed(2)
    size, length = drafter.config.decoder.hidden_size, drafter.config.context_length
    token = torch.randn(2, size, generator=generator)
    context = torch.randn(2, length, drafter.config.context_size, generator=generator)
    exact, found = plain(token, context), drafter(token, context)
    assert 0 < (found - exact).norm() / exact.norm() < 0.2
    # The head may be quantised too, and its rows are what the reduced vocabulary guesses from.
    model = random_model(target, 0)
    model.language.lm_head = Int8Linear(model.language.lm_head)
    ids = torch.tensor([3, 17, 40])
    drafter.restrict(model.language, ids)
    assert set(drafter.propose(model.language, torch.tensor([5]), context[:1], None)[0].tolist()) <= set(ids.tolist())
