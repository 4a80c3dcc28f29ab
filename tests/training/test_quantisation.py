"""A whole checkpoint quantised: what is written, what is reported, and going on after an interruption."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.clip import Clip, Window
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.model.paroquant import ParoLinear
from flashdrive_node.model.precision import PRESETS
from flashdrive_node.training import quantisation
from flashdrive_node.training.architecture import alpamayo_small
from flashdrive_node.training.layer_inputs import InputSettings, collect_inputs
from flashdrive_node.training.quantisation import QuantisationReport, quantisable, quantise_checkpoint
from flashdrive_node.training.quantisation_report import markdown, write_report
from flashdrive_node.training.rotation_fit import FitSettings
from flashdrive_node.training.vocabulary import build_tokenizer
from support.small_models import random_model
from support.tiny_dimensions import TINY

#: o_proj has 64 columns, which make no group.
DIMS = TINY | {"layers": 1, "text_hidden": 128, "text_mlp": 128, "text_heads": 4, "kv_heads": 2}
INPUTS, FITTING = InputSettings(windows=3, stride=1, rows=16), FitSettings(steps=3, rows=16)


class PaintedClips:
    """Two clips of two windows with pictures of nothing."""

    name = "painted"
    camera_indices = (0, 1, 2, 6)

    def __len__(self) -> int:
        return 2

    def clips(self) -> Iterator[Clip]:
        for clip in range(2):
            yield Clip(str(clip), (Window(_observation(2 * clip + i), None) for i in range(2)))


def _observation(number: int) -> Observation:
    rng = np.random.default_rng(number)
    stamps = (0, 1, 2, 3)
    cameras = tuple(
        CameraFrames(index, stamps, tuple(rng.integers(0, 255, (4, 160, 288, 3), dtype=np.uint8)))
        for index in PaintedClips.camera_indices
    )
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = 0.5 * np.arange(-15, 1)
    return Observation(number, 0, cameras, xyz, np.tile(np.eye(3, dtype=np.float32), (16, 1, 1)), None)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("plain")
    config = alpamayo_small(build_tokenizer(folder / "tokenizer"), **DIMS)
    model = random_model(config, seed=4)
    directory = save_checkpoint(model, config, folder / "checkpoint", tokenizer_files_dir=folder / "tokenizer")
    return load_alpamayo(directory, dtype=torch.float32)


def quantise(loaded: LoadedModel, out: Path) -> QuantisationReport:
    stages = PRESETS["w4a8"]
    return quantise_checkpoint(loaded, PaintedClips(), stages, out, loaded.info.path / "vlm", INPUTS, FITTING)


@pytest.fixture(scope="module")
def done(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantisationReport]:
    out = tmp_path_factory.mktemp("quantised") / "out"
    return out, quantise(loaded, out)


def test_checkpoint_drives(done: tuple[Path, QuantisationReport]) -> None:
    out, report = done
    assert [layer.layer for layer in report.layers] == [f"language.layers.0.{x}" for x in ("qkv", "gate_up", "down")]
    assert report.left_out == ["language.layers.0.o_proj"]
    assert all(0 < layer.error < 0.3 and 0 < layer.nearest_error < 0.3 for layer in report.layers)
    assert not out.with_name("out.parts").exists()
    loaded = load_alpamayo(out, dtype=torch.float32)
    assert isinstance(loaded.model.language.layers[0].qkv, ParoLinear)
    prediction = PlainEngine(PlainSettings("loaded", device="cpu"), loaded).step(_observation(9))
    assert np.isfinite(prediction.samples[0].xyz).all()


def test_report(done: tuple[Path, QuantisationReport], tmp_path: Path) -> None:
    write_report(done[1], tmp_path)
    text = (tmp_path / "quantisation.md").read_text()
    assert text == markdown(done[1]) + "\n"
    assert "| language.layers.0.down | 128 x 128 |" in text
    assert "no whole groups: language.layers.0.o_proj" in text
    assert json.loads((tmp_path / "quantisation.json").read_text())["layers"][0]["rows"] == 128


def test_interrupted_and_gone_on(
    loaded: LoadedModel,
    done: tuple[Path, QuantisationReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[int] = []
    original = quantisation.fit

    def counted(weight: torch.Tensor, *args: object) -> object:
        fitted.append(len(weight))
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return original(weight, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(quantisation, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        quantise(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = quantise(loaded, tmp_path / "out")
    assert len(fitted) == 4  # three layers, one of them twice
    assert report.layers == done[1].layers
    weights = [(folder / "model.safetensors").read_bytes() for folder in (done[0], tmp_path / "out")]
    assert weights[0] == weights[1]


def test_rows_are_of_prompt_and_text_and_of_different_windows(loaded: LoadedModel) -> None:
    names, _ = quantisable(loaded.model)
    met = collect_inputs(loaded, PaintedClips(), names, INPUTS)
    for name in names:
        # Two windows to fit on and one held out, each with rows of the prompt and of the text.
        assert 2 * 16 < len(met.fit[name]) <= 4 * 16
        assert 16 < len(met.held_out[name]) <= 2 * 16
        assert met.fit[name].shape[1] == 128


def test_settings_and_models_that_cannot_be_used(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 windows"):
        InputSettings(windows=1)
    with pytest.raises(InputError, match="4-bit text layers"):
        quantise_checkpoint(loaded, PaintedClips(), PRESETS["fp8"], tmp_path / "x", None, INPUTS, FITTING)
