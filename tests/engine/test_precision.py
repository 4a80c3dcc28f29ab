"""What "auto" stands for, and what the settings make of a precision's name."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashdrive_node.engine.drafter import load_drafter
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.precision import Card, Choice, automatic, choose
from flashdrive_node.engine.precision_speeds import MeasuredSpeed, read_speeds
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model.errors import ConfigError, InputError
from flashdrive_node.model.fp8 import Fp8Linear
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.precision import PRESETS, StagePrecision
from flashdrive_node.model.presets import alpamayo_1_5_10b
from support.checkpoints import BUNDLED, edit_json
from support.small_models import random_model, small_config

GIB = 2**30


@pytest.mark.parametrize(
    ("memory_gib", "samples", "preset", "said"),
    [
        (139, 1, "bf16", "needed are: bf16 21.1, fp8 11."),
        (32, 6, "bf16", "needed are: bf16"),
        (24, 1, "fp8", "of 24.0 GiB, 20.4 are reckoned with"),
        (12, 1, "fp8", "'flashdrive quantize' makes a checkpoint that takes 8."),
    ],
)
def test_least_rounding_that_fits(memory_gib: int, samples: int, preset: str, said: str) -> None:
    choice = choose(alpamayo_1_5_10b(), Card(memory_gib * GIB, "8.6"), samples, [])
    assert choice.stages == PRESETS[preset]
    assert choice.reason.startswith(preset)
    assert said in choice.reason


def speed(preset: str, window_ms: float, samples: int = 1, capability: str = "9.0", size: int = 4096) -> MeasuredSpeed:
    return MeasuredSpeed(capability, "NVIDIA H200", size, samples, preset, window_ms, "a test")


def test_fastest_that_fits() -> None:
    config, big, small = alpamayo_1_5_10b(), Card(139 * GIB, "9.0"), Card(16 * GIB, "9.0")
    speeds = [speed("bf16", 60), speed("fp8", 40), speed("w4a8", 45), speed("w4a16", 42), speed("fp8", 70, samples=6)]
    choice = choose(config, big, 1, speeds)
    assert choice.stages == PRESETS["fp8"]
    assert choice.reason.endswith("measured on NVIDIA H200 with 1 sample(s): bf16 60.0 ms, fp8 40.0 ms")
    assert choose(config, big, 1, [speed("bf16", 30), speed("fp8", 40)]).stages == PRESETS["bf16"]
    assert choose(config, big, 1, speeds, packed=True).stages == PRESETS["w4a16"]
    assert choose(config, small, 1, speeds).stages == PRESETS["fp8"]
    # Times of one number of samples are compared, of the nearest that more than one preset has.
    assert choose(config, big, 6, speeds).stages == PRESETS["fp8"]
    assert choose(config, big, 6, [*speeds, speed("bf16", 65, samples=6)]).stages == PRESETS["bf16"]
    for others in ([speed("fp8", 40, capability="12.0")], [speed("fp8", 40, size=256)], [speed("fp8", 40)]):
        assert choose(config, big, 1, others).stages == PRESETS["bf16"]
    assert choose(config, big, 1, [], packed=True).stages is None


def test_calibrated_checkpoints_run_in_what_they_were_calibrated_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED, checkpoint)
    backbone = json.loads((BUNDLED / "config.json").read_text())["vlm_name_or_path"]
    edit_json(checkpoint / "config.json", vlm_name_or_path=str((BUNDLED / backbone).resolve()))
    card = SimpleNamespace(total_memory=139 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert automatic(checkpoint, torch.device("cuda"), 1).stages == PRESETS["bf16"]
    edit_json(checkpoint / "config.json", stage_precision={"vision": "fp8_static"})
    found = automatic(checkpoint, torch.device("cuda"), 1)
    assert found == Choice(None, "as the checkpoint says, which was calibrated for it")


def test_table_of_speeds(tmp_path: Path) -> None:
    assert isinstance(read_speeds(), list)
    path = tmp_path / "speeds.json"
    good = asdict(speed("fp8", 40))
    path.write_text(json.dumps({"rows": [good]}))
    assert read_speeds(path) == [speed("fp8", 40)]
    bad = [good | {"preset": "int3"}, good | {"window_ms": "fast"}, {"preset": "fp8"}, good | {"window_ms": 0}]
    path.write_text(json.dumps({"rows": bad}))
    with pytest.raises(ConfigError, match=r"4 problem(.|\n)*row 0: a preset of(.|\n)*row 1: key 'window_ms' must be"):
        read_speeds(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="a list 'rows' is required"):
        read_speeds(path)


def test_elsewhere_the_checkpoint_decides() -> None:
    assert automatic(BUNDLED, torch.device("cpu"), 1).stages is None
    engine = PlainEngine(PlainSettings(str(BUNDLED), device="cpu"))
    assert engine.load().precision_reason == "as the checkpoint says, on cpu"


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
    info = engine.load()
    assert (info.precision, info.precision_reason) == ("float32, fp8", "")
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
