"""The public layouts of 4-bit checkpoints: packed as published, read back, recognised, and refused where mixed."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flashdrive_node.cli.inspect import examine, render
from flashdrive_node.model import paro_layouts
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.errors import CheckpointError
from flashdrive_node.model.linear import QuantisedLinear
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.model.packings import unpack_int16, unpack_marlin
from flashdrive_node.model.paro_layouts import INT16, MARLIN, read_generic, write_generic
from flashdrive_node.model.paroquant import ParoLinear, ParoWeight
from support.published_packings import int16_tensors, int16_words, marlin_tensors, marlin_words
from support.quantised import plain_model, quantised_checkpoint, random_weight, republished
from support.small_models import random_model
from support.tiny_dimensions import TINY

Q_PROJ = "vlm.model.language_model.layers.1.self_attn.q_proj"
#: k and v have 64 rows, as many as a tile of Marlin's is wide; o_proj has 64 columns, which make no group.
WIDE = TINY | {"text_hidden": 256, "text_mlp": 256, "text_heads": 4, "kv_heads": 4, "expert_heads": 4}
PUBLISHED = {"int16": int16_tensors, "Marlin": marlin_tensors}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own_cache"))


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def plain(tokenizer_files: Path) -> Alpamayo:
    return plain_model(tokenizer_files, WIDE)


@pytest.fixture(scope="module")
def checkpoint(plain: Alpamayo, tokenizer_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_checkpoint(plain, tokenizer_files, tmp_path_factory.mktemp("quantised") / "checkpoint")


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_packed_integers_come_back(rows: int, blocks: int, seed: int) -> None:
    codes = torch.randint(16, (64 * rows, 64 * blocks), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.uint8)
    assert torch.equal(unpack_marlin(marlin_words(codes)), codes)
    assert torch.equal(unpack_int16(int16_words(codes)), codes)


def stripped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}


@given(st.sampled_from([64, 192]), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_layers_come_back(rows: int, groups: int, seed: int) -> None:
    weight = random_weight(rows, groups, seed)
    found = INT16.read(stripped(int16_tensors(weight)))
    assert weight.shares_input_with(found)
    assert all(torch.equal(a, b) for a, b in zip(weight.matrix, found.matrix, strict=True))
    found = MARLIN.read(stripped(marlin_tensors(weight)))
    assert torch.equal(weight.matrix.codes, found.matrix.codes)
    assert torch.equal(weight.matrix.zeros, found.matrix.zeros)
    # Scales are whole 4096ths of the largest, and rounded to float16 again.
    step = float(weight.matrix.scales.max()) / 4096
    torch.testing.assert_close(found.matrix.scales.float(), weight.matrix.scales.float(), atol=step, rtol=1e-3)


def test_groups_without_a_scale_are_zero() -> None:
    weight = random_weight(64, 2, seed=3)
    weight.matrix.scales[5, 1] = 0
    found = INT16.read(stripped(int16_tensors(weight)))
    assert ParoLinear(found).matrix.zeros[5, 1] == 0
    torch.testing.assert_close(ParoLinear(found).dequantised(), ParoLinear(weight).dequantised())


@pytest.mark.parametrize("layout", ["int16", "Marlin"])
def test_checkpoint_of_each_layout(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    copy = republished(checkpoint, tmp_path / "copy", PUBLISHED[layout])
    loaded = load_alpamayo(copy, dtype=torch.float32, hash_files=False)
    expected = load_alpamayo(checkpoint, dtype=torch.float32, hash_files=False).model
    assert loaded.precision.decode == "w4a8"
    for name, layer in loaded.model.named_modules():
        if isinstance(layer, ParoLinear):
            same = expected.get_submodule(name)
            assert isinstance(same, ParoLinear)
            torch.testing.assert_close(layer.dequantised(), same.dequantised(), atol=1e-4, rtol=2e-3)
    assert torch.equal(loaded.model.vision.patch_embed.weight, expected.vision.patch_embed.weight)


@pytest.mark.parametrize("layout", ["int16", "Marlin"])
def test_one_layer_is_compared_with_the_base(
    plain: Alpamayo, checkpoint: Path, tokenizer_files: Path, tmp_path: Path, layout: str
) -> None:
    copy = republished(checkpoint, tmp_path / "copy", PUBLISHED[layout])
    bases = []
    for name, model in (("own", plain), ("other", random_model(plain.config, seed=99))):
        bases.append(save_checkpoint(model, model.config, tmp_path / name, tokenizer_files_dir=tokenizer_files))
    report = examine(copy, base=bases[0])
    assert report["problems"] == []
    assert report["quantised"] == {"layout": report["base"]["layout"], "layers": 6}
    assert layout in report["base"]["layout"]
    assert 0.02 < report["base"]["relative_error"] < 0.15
    assert "% away from it" in render(report)
    (problem,) = examine(copy, base=bases[1])["problems"]
    assert "q_proj: a matrix within 50%" in problem
    assert "quantised from another model" in problem
    (problem,) = examine(bases[0], base=bases[0])["problems"]
    assert "layers in 4 bits are required to compare with a base, found none" in problem


def test_foreign_layouts_are_unpacked_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = republished(checkpoint, tmp_path / "copy", marlin_tensors)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level("INFO"):
        first = load_alpamayo(copy, dtype=torch.float32)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    assert f"are kept in {file}" in caplog.text
    written = file.stat().st_mtime_ns
    copy = copy.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(paro_layouts, "unpack_marlin", lambda _: pytest.fail("unpacked again"))
    second = load_alpamayo(copy, dtype=torch.float32)
    assert file.stat().st_mtime_ns == written
    # The hash is the checkpoint's alone.
    assert first.info.sha256 == second.info.sha256
    assert list(second.info.file_sha256) == ["model.safetensors"]
    for one, two in zip(first.model.buffers(), second.model.buffers(), strict=True):
        assert torch.equal(one, two)
    # A file that was cut is written anew.
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    load_alpamayo(copy, dtype=torch.float32)
    assert file.read_bytes() == whole
    # Another content has another file, and a directory that cannot be written costs nothing but the time.
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{Q_PROJ}.rotate_linear.qlinear.qweight"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy / "config.json"))
    caplog.clear()
    third = load_alpamayo(copy, dtype=torch.float32).model.language.layers[1].qkv
    assert isinstance(third, QuantisedLinear)
    same = second.model.language.layers[1].qkv
    assert isinstance(same, QuantisedLinear)
    assert not torch.equal(third.dequantised(), same.dequantised())
    assert "unpacked matrices cannot be kept" in caplog.text


def test_mixed_layouts(checkpoint: Path, tmp_path: Path) -> None:
    copy = republished(checkpoint, tmp_path / "copy", marlin_tensors, only="layers.0.mlp")
    with pytest.raises(CheckpointError, match=r"one layout .* found 2: .*generic \(paroquant\).*Marlin \(-PARO\)"):
        load_alpamayo(copy, dtype=torch.float32, hash_files=False)


def test_factor_of_the_scales_with_a_dimension(checkpoint: Path, tmp_path: Path) -> None:
    def with_one(weight: ParoWeight) -> dict[str, torch.Tensor]:
        return {name: tensor.view(1) if tensor.ndim == 0 else tensor for name, tensor in marlin_tensors(weight).items()}

    copies = [
        republished(checkpoint, tmp_path / "a", marlin_tensors),
        republished(checkpoint, tmp_path / "b", with_one),
    ]
    one, two = (load_alpamayo(copy, dtype=torch.float32, hash_files=False).model for copy in copies)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))


def test_missing_scale_of_a_marlin_matrix(checkpoint: Path, tmp_path: Path) -> None:
    def without(weight: ParoWeight) -> dict[str, torch.Tensor]:
        tensors = marlin_tensors(weight)
        del tensors["rotate_linear.qlinear.input_global_scale"]
        return tensors

    copy = republished(checkpoint, tmp_path / "copy", without)
    with pytest.raises(CheckpointError, match=r"missing: .*q_proj.rotate_linear.qlinear.input_global_scale"):
        load_alpamayo(copy, dtype=torch.float32, hash_files=False)


def test_matrices_that_are_too_narrow_for_marlin(tmp_path: Path) -> None:
    """k and v of 32 rows fill no tile of Marlin's, whatever the names say."""
    folder = tmp_path / "narrow"
    model = plain_model(folder / "tokenizer", WIDE | {"kv_heads": 2})
    narrow = quantised_checkpoint(model, folder / "tokenizer", folder / "checkpoint")

    def claimed(weight: ParoWeight) -> dict[str, torch.Tensor]:
        rows, columns = weight.matrix.shape
        return {f"rotate_linear.qlinear.{name}": torch.zeros(shape) for name, (_, shape) in
                MARLIN.tensors(rows, columns).items()}  # fmt: skip

    copy = republished(narrow, tmp_path / "copy", claimed)
    with pytest.raises(CheckpointError, match=r"k_proj: 32 x 256, .*rows in multiples of 64 and columns of 128"):
        load_alpamayo(copy, dtype=torch.float32, hash_files=False)


def test_generic_layout_there_and_back() -> None:
    weight = random_weight(24, 2, seed=14)
    read = read_generic(write_generic(weight))
    assert weight.shares_input_with(read)
    assert all(torch.equal(a, b) for a, b in zip(weight.matrix, read.matrix, strict=True))
