"""Checkpoints come in and go out without a changed bit, in whatever files and types, and never twice in memory."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint import load_weights
from flashdrive_node.model.checkpoint_writer import random_checkpoint, random_weights, save_checkpoint
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import CheckpointError
from flashdrive_node.model.presets import alpamayo_1_5_10b, alpamayo_r1_10b, parameter_count
from flashdrive_node.model.source import read_config, tokenizer_directory
from flashdrive_node.model.state_dict import release_slots
from support.checkpoints import BUNDLED, STUB, load, release_tensors
from support.small_models import random_model, small_config

QUICK = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def assert_equal(a: Alpamayo, b: Alpamayo) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("config", [alpamayo_1_5_10b(), alpamayo_r1_10b()], ids=["1.5", "R1"])
def test_published_size(config: AlpamayoConfig) -> None:
    required = [slot for slot in release_slots(config) if not slot.optional]
    assert parameter_count(config) == 11_078_526_194
    assert len(required) == 1159
    assert sum(name.startswith("vlm.") for name in (slot.name for slot in required)) == 750


def test_every_tensor_lands_where_it_belongs() -> None:
    model, info = load(BUNDLED, torch.float32)
    tensors = release_tensors(BUNDLED)
    assert info.tensors == len(tensors)
    assert info.bytes == sum(t.nbytes for t in tensors.values())
    assert info.sha256 == hashlib.sha256((BUNDLED / "model.safetensors").read_bytes()).hexdigest()

    def stacked(names: str, *parts: str) -> torch.Tensor:
        return torch.cat([tensors[names.format(part)] for part in parts]).float()

    for i, layer in enumerate(model.language.layers):
        name = f"vlm.model.language_model.layers.{i}"
        assert torch.equal(layer.qkv.weight, stacked(name + ".self_attn.{}_proj.weight", "q", "k", "v"))
        assert torch.equal(layer.gate_up.weight, stacked(name + ".mlp.{}_proj.weight", "gate", "up"))
    patch = tensors["vlm.model.visual.patch_embed.proj.weight"]
    assert torch.equal(model.vision.patch_embed.weight, patch.float().flatten(1))
    assert torch.equal(
        model.expert.action_in_proj.linears[2].bias, tensors["action_in_proj.encoder.trunk.6.bias"].float()
    )
    assert not any(t.is_meta for t in model.state_dict().values())


@QUICK
@given(
    r1=st.booleans(),
    layers=st.integers(1, 3),
    shard_bytes=st.integers(2_000, 400_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_round_trip_is_exact(r1: bool, layers: int, shard_bytes: int, dtype: torch.dtype, seed: int) -> None:
    config = small_config(r1=r1, layers=layers, deepstack=[0])
    model = random_model(config, seed, dtype)
    with TemporaryDirectory() as folder:
        directory = save_checkpoint(model, config, Path(folder) / "saved", shard_bytes, dtype=None)
        found = read_config(directory)
        assert found.raw == config.raw | {"vlm_name_or_path": "vlm"}
        assert found.raw_vlm == config.raw_vlm
        again, info = load(directory, dtype)
        assert_equal(model, again)

        # The safetensors library reads the same, and the files keep to their limit.
        tensors = release_tensors(directory)
        assert tensors.keys() == {slot.name for slot in release_slots(config)}
        assert all(tuple(tensors[slot.name].shape) == slot.shape for slot in release_slots(config))
        shards = [load_file(path) for path in directory.glob("*.safetensors")]
        sizes = [sum(t.nbytes for t in shard.values()) for shard in shards]
        assert all(size <= shard_bytes or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
        assert info.bytes == sum(sizes)
        index = directory / "model.safetensors.index.json"
        assert index.exists() == (len(shards) > 1)
        if index.exists():
            assert json.loads(index.read_text())["metadata"]["total_size"] == sum(sizes)


@QUICK
@given(
    file_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    model_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    piece_bytes=st.sampled_from([4, 20, 4096, 1 << 20]),
)
def test_types_and_pieces(file_dtype: torch.dtype, model_dtype: torch.dtype, piece_bytes: int) -> None:
    """Tensors are cast as torch casts them, however finely the reading is cut."""
    config = small_config(layers=1, vision_depth=1, deepstack=[0], table=4)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashdrive_node.model.checkpoint.PIECE_BYTES", piece_bytes)
        directory = random_checkpoint(config, Path(folder) / "random", dtype=file_dtype)
        if piece_bytes < 4096:  # the vocabulary would take minutes by the byte
            tensors = {n: t for n, t in release_tensors(directory).items() if n.startswith("expert.")}
            save_file(tensors, Path(folder) / "expert.safetensors")
            patch.setattr("flashdrive_node.model.checkpoint.PIECE_BYTES", 1 << 20)
            model, _ = load(directory, model_dtype)
            for parameter in model.expert.layers.parameters():
                parameter.zero_()
            patch.setattr("flashdrive_node.model.checkpoint.PIECE_BYTES", piece_bytes)
            slots = [slot for slot in release_slots(config) if slot.name in tensors]
            load_weights(_Part(model), slots, Path(folder) / "expert.safetensors", "cpu")
        else:
            model, _ = load(directory, model_dtype)
        tensors = release_tensors(directory)
    state = model.state_dict()
    for slot in release_slots(config):
        found = state[slot.target].narrow(0, slot.row, slot.shape[0]).reshape(slot.shape)
        assert torch.equal(found, tensors[slot.name].to(found.dtype)), slot.name


class _Part(torch.nn.Module):
    """Only the expert's layers and norm, under their names in the whole model."""

    def __init__(self, model: Alpamayo):
        super().__init__()
        self.expert = torch.nn.Module()
        self.expert.layers = model.expert.layers
        self.expert.norm = model.expert.norm


def test_tied_to_no_name_of_file_or_order(tmp_path: Path) -> None:
    """Whatever the one file is called, in whatever order the library wrote it, with whatever metadata."""
    tensors = release_tensors(BUNDLED)
    save_file(dict(reversed(tensors.items())), tmp_path / "weights.safetensors", metadata={"origin": "elsewhere"})
    (tmp_path / "config.json").write_text((BUNDLED / "config.json").read_text().replace("../vlm_stub", str(STUB)))
    assert_equal(load(BUNDLED)[0], load(tmp_path)[0])


def test_r1_constants_come_from_the_file(tmp_path: Path) -> None:
    config = small_config(r1=True)
    random_checkpoint(config, tmp_path / "r1", dtype=torch.float32)
    constants = torch.tensor([0.5, 2.0, -0.25, 0.125])
    tensors = release_tensors(tmp_path / "r1")
    names = [f"action_space.{n}" for n in ("accel_mean", "accel_std", "curvature_mean", "curvature_std")]
    tensors |= {name: value.clone() for name, value in zip(names, constants, strict=True)}
    save_file(tensors, tmp_path / "r1" / "model.safetensors")
    model, info = load(tmp_path / "r1")
    assert torch.equal(model.action_space.constants, constants)
    assert info.tensors == len(release_slots(config))

    # Without them the code's own constants stay.
    save_file({n: t for n, t in tensors.items() if n not in names}, tmp_path / "r1" / "model.safetensors")
    plain, _ = load(tmp_path / "r1")
    expected = Alpamayo.on_meta(config, torch.bfloat16)
    expected.set_constants("release", "cpu")
    assert torch.equal(plain.action_space.constants, expected.action_space.constants)


def test_saved_checkpoint_stands_on_its_own(tmp_path: Path) -> None:
    config = read_config(BUNDLED)
    model, _ = load(BUNDLED)
    saved = save_checkpoint(model, config, tmp_path / "saved", tokenizer_files_dir=tokenizer_directory(BUNDLED, config))
    moved = saved.rename(tmp_path / "elsewhere")
    assert tokenizer_directory(moved, read_config(moved)) == moved / "vlm"
    assert (moved / "vlm" / "tokenizer.json").read_bytes() == (STUB / "tokenizer.json").read_bytes()
    assert_equal(model, load(moved)[0])
    # The bundled weights are bfloat16, so the default type of saving loses nothing of them.
    original, written = release_tensors(BUNDLED), release_tensors(moved)
    assert original.keys() == written.keys()
    assert all(torch.equal(original[name], written[name]) for name in original)


def test_saving_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(BUNDLED)
    model, _ = load(BUNDLED)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="a new or empty directory is required, found one in use"):
        save_checkpoint(model, config, tmp_path / "used")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flashdrive_node.model.safetensors_file.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, config, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_random_weights_are_those_of_the_random_checkpoint(tmp_path: Path) -> None:
    config = small_config(r1=True)
    model = Alpamayo.on_meta(config, torch.bfloat16)
    random_weights(model, config, "cpu", seed=3)
    one, _ = load(random_checkpoint(config, tmp_path / "one", seed=3))
    many, info = load(random_checkpoint(config, tmp_path / "many", seed=3, max_shard_bytes=20_000))
    assert len(info.file_sha256) > 5
    assert_equal(model, one)
    assert_equal(model, many)
    other, _ = load(random_checkpoint(config, tmp_path / "other", seed=4))
    assert not torch.equal(other.language.lm_head.weight, one.language.lm_head.weight)
    weight = one.language.lm_head.weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(one.language.norm.weight, torch.ones_like(one.language.norm.weight))


def test_hashes_are_those_of_sha256sum(tmp_path: Path) -> None:
    directory = random_checkpoint(small_config(), tmp_path / "c", max_shard_bytes=200_000)
    _, info = load(directory)
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    listing = subprocess.run(["sha256sum", *names], cwd=directory, check=True, capture_output=True).stdout
    assert "".join(f"{info.file_sha256[name]}  {name}\n" for name in names).encode() == listing
    assert info.sha256 == hashlib.sha256(listing).hexdigest()
    _, unhashed = load(directory, hash_files=False)
    assert (unhashed.sha256, unhashed.file_sha256, unhashed.bytes) == ("", {}, info.bytes)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[float] = []
    load(BUNDLED, progress=lambda fraction, _: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert 2 <= len(seen) <= 101


@pytest.mark.parametrize("as_directory", [True, False])
def test_overlay_replaces_the_expert(tmp_path: Path, as_directory: bool, caplog: pytest.LogCaptureFixture) -> None:
    base, plain = load(BUNDLED)
    name, bias = "expert.layers.1.self_attn.k_proj.weight", "action_out_proj.bias"
    tensors = {n: torch.full_like(release_tensors(BUNDLED)[n], 0.5).float() for n in (name, bias)}
    save_file(tensors, tmp_path / "model.safetensors")
    with caplog.at_level("INFO"):
        model, info = load(BUNDLED, overlay=tmp_path if as_directory else tmp_path / "model.safetensors")
    assert info.replaced == tuple(sorted(tensors))
    assert name in caplog.text
    assert info.tensors == plain.tensors
    assert info.file_sha256.keys() == {"model.safetensors", "overlay/model.safetensors"}
    assert info.file_sha256["model.safetensors"] == plain.sha256 != info.sha256

    rows = slice(model.expert.config.q_size, model.expert.config.q_size + model.expert.config.kv_size)
    assert (model.expert.layers[1].qkv.weight[rows] == 0.5).all()
    assert (model.expert.action_out_proj.bias == 0.5).all()
    model.expert.layers[1].qkv.weight[rows] = base.expert.layers[1].qkv.weight[rows]
    model.expert.action_out_proj.bias.copy_(base.expert.action_out_proj.bias)
    assert_equal(model, base)


def test_storage_that_is_there_is_used() -> None:
    model, _ = load(BUNDLED)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    load_weights(model, release_slots(model.config), BUNDLED, "cpu")
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert_equal(model, load(BUNDLED)[0])


def test_explicit_type_holds_for_all_weights() -> None:
    model = Alpamayo.on_meta(read_config(BUNDLED), torch.bfloat16)
    load_weights(model, release_slots(model.config), BUNDLED, "cpu", dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())


MEASURE = """
import resource, sys
from pathlib import Path
from support.checkpoints import load
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.source import read_config
directory = Path(sys.argv[1])
load(Path(sys.argv[2]))  # what loading itself needs, whatever the size
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model, info = load(directory)
loaded = peak()
save_checkpoint(model, read_config(directory), directory.with_name("saved"), max_shard_bytes=100_000_000)
print(info.bytes, loaded - before, peak() - loaded)
"""


def test_never_twice_in_memory(tmp_path: Path) -> None:
    config = small_config(text_hidden=1024, layers=6, text_inter=4096, head_dim=64, heads=16, section=[16, 8, 8])
    directory = random_checkpoint(config, tmp_path / "c", max_shard_bytes=100_000_000)
    tests = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(directory), str(BUNDLED)],
        env={"PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    weights, loading, saving = map(int, result.stdout.split())
    assert weights == 2 * math.fsum(math.prod(slot.shape) for slot in release_slots(config))
    assert weights > 150e6
    assert loading < 1.5 * weights
    assert saving < 0.3 * weights
