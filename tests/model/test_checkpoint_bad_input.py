"""What is wrong with a checkpoint is said at once, all of it, before any weight is read."""

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint import load_weights, place_of
from flashdrive_node.model.checkpoint_files import collapse
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.errors import CheckpointError, ConfigError
from flashdrive_node.model.source import read_config
from flashdrive_node.model.state_dict import TensorSlot, release_slots
from support.checkpoints import BUNDLED, STUB, edit_header, edit_json, header_of, load, release_tensors

K_PROJ = "expert.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """The bundled checkpoint, to be damaged."""
    return copy_bundled(tmp_path)


def copy_bundled(folder: Path) -> Path:
    shutil.copytree(STUB, folder / "vlm_stub")
    return Path(shutil.copytree(BUNDLED, folder / "checkpoint"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The bundled checkpoint in several files."""
    model, _ = load(BUNDLED)
    return save_checkpoint(model, model.config, tmp_path / "shards", max_shard_bytes=400_000)


def problems_of(directory: Path, **options: Any) -> list[str]:
    """What loading complains about; the model must have been left alone."""
    model = Alpamayo.on_meta(read_config(BUNDLED), torch.bfloat16)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, release_slots(model.config), directory, "cpu", **options)
    assert caught.value.where == str(directory)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert all(parameter.is_meta for parameter in model.parameters())
    return caught.value.problems


def replace_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    """Write the one file anew with tensors changed, added or (None) left out."""
    tensors = release_tensors(directory) | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors")


def test_missing_shard(shards: Path) -> None:
    gone = sorted(shards.glob("*.safetensors"))[1]
    held, _ = header_of(gone)
    gone.unlink()
    assert problems_of(shards) == [f"{gone.name}: required, not found ({len(held) - 1} tensors)"]


def test_empty_directory(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == ["no *.safetensors file"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "alpamayo.pt", "last.ckpt"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / name)
    (problem,) = problems_of(tmp_path)
    assert "safetensors files are required, found only pickles, which can run code when they are read" in problem
    assert name in problem


def test_index_of_pickles_is_refused(shards: Path) -> None:
    edit_json(shards / "model.safetensors.index.json", weight_map={K_PROJ: "pytorch_model-00001.bin"})
    assert any("names of safetensors files in the same directory are required" in p for p in problems_of(shards))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"a": [1, 2, 3] * 20}, protocol=2), "a Python pickle"),
        (b"PK\x03\x04" + bytes(60), "a PyTorch zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"", "truncated in its header"),
        (b"\x10\x00", "truncated in its header"),
        (b"\xff" * 64, "the header should be 18446744073709551615 bytes long"),
        ((2).to_bytes(8, "little") + b"[]", "a JSON object is required"),
        ((2).to_bytes(8, "little") + b"{{", "corrupt header"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "corrupt header"),
        ((60_000).to_bytes(8, "little") + b"[" * 60_000, "corrupt header"),
    ],
)
def test_file_that_is_something_else(one: Path, content: bytes, reason: str) -> None:
    (one / "model.safetensors").write_bytes(content)
    (problem,) = problems_of(one)
    assert reason in problem
    assert problem.startswith("model.safetensors: ")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_flipped_bit_in_a_header(data: st.DataObject) -> None:
    """Every bit of the header matters, but for those of the free-form metadata."""
    with TemporaryDirectory() as folder:
        path = copy_bundled(Path(folder)) / "model.safetensors"
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        metadata = content.index(b"__metadata__") - 1
        # Where the metadata stands: its name, and an object with one entry.
        skipped = range(metadata, content.index(b"}", metadata) + 1)
        position = data.draw(st.integers(0, 8 + length - 1).filter(lambda i: i not in skipped))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        assert problems_of(path.parent)


def test_damaged_shard_hides_nothing_of_the_others(shards: Path) -> None:
    first, second, third, *_ = sorted(shards.glob("*.safetensors"))
    first.write_bytes(first.read_bytes().replace(b'"dtype"', b'"dtypo"', 1))
    content = bytearray(second.read_bytes())
    content[20] ^= 0x80
    second.write_bytes(content)
    third.write_bytes(third.read_bytes()[:-1])
    problems = problems_of(shards)
    assert [p for p in problems if p.startswith(f"{first.name}: corrupt header: tensor")]
    assert [p for p in problems if p.startswith(f"{second.name}: corrupt header: ")]
    assert [p for p in problems if p.startswith(f"{third.name}: truncated: ")]
    assert not [p for p in problems if p.startswith(("missing", "unexpected"))]


def test_truncated_file(one: Path) -> None:
    path = one / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - 1000])
    (problem,) = problems_of(one)
    assert f"truncated: the header requires {size} bytes, the file has {size - 1000}" in problem


def test_bytes_behind_the_end(one: Path) -> None:
    path = one / "model.safetensors"
    path.write_bytes(path.read_bytes() + bytes(3))
    assert problems_of(one) == ["model.safetensors: 3 bytes behind the last tensor"]


def move(header: dict[str, Any], by: int) -> None:
    start, end = header[K_PROJ]["data_offsets"]
    header[K_PROJ]["data_offsets"] = [start + by, end + by]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda h: move(h, 2), "unused bytes"),
        (lambda h: move(h, -2), "overlaps"),
        (lambda h: h[K_PROJ].update(dtype="BF17"), "unknown dtype 'BF17'"),
        (lambda h: h[K_PROJ].update(dtype=["BF16"]), "unknown dtype ['BF16']"),
        (lambda h: h[K_PROJ].update(shape=[-32, -48]), "integers >= 0 are required"),
        (lambda h: h[K_PROJ].update(shape=[32, 48.0]), "integers >= 0 are required"),
        (lambda h: h[K_PROJ].update(shape=[32, 47]), "takes 3008 bytes, data_offsets"),
        (lambda h: h[K_PROJ].update(data_offsets=[0]), "two data_offsets are required"),
        (lambda h: h[K_PROJ].pop("shape"), "'dtype', 'shape' and 'data_offsets' are required"),
        (lambda h: h.update({K_PROJ: 7}), "'dtype', 'shape' and 'data_offsets' are required"),
    ],
)
def test_header_that_contradicts_itself(one: Path, edit: Callable[[dict[str, Any]], None], reason: str) -> None:
    edit_header(one / "model.safetensors", edit)
    problems = problems_of(one)
    assert any(reason in problem for problem in problems)
    assert not any(problem.startswith("missing") for problem in problems)


def test_duplicate_name_in_a_header(one: Path) -> None:
    path = one / "model.safetensors"
    name = K_PROJ.encode()
    path.write_bytes(path.read_bytes().replace(name, name.replace(b"layers.1", b"layers.0"), 1))
    assert any("duplicate names" in problem for problem in problems_of(one))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_wrong_type(one: Path, dtype: torch.dtype) -> None:
    replace_tensors(one, **{K_PROJ: release_tensors(one)[K_PROJ].to(dtype)})
    (problem,) = problems_of(one)
    assert problem.startswith(f"{K_PROJ}: one of BF16, F16, F32 is required, found ")


def test_all_that_is_wrong_in_one_error(one: Path, tmp_path: Path) -> None:
    tensors = release_tensors(one)
    lm_head = tensors["vlm.lm_head.weight"]
    names = [f"vlm.model.language_model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    replace_tensors(
        one,
        **{
            "vlm.lm_head.weight": lm_head[:444].clone(),
            "vlm.model.visual.merger.norm.bias": None,
            "vlm.model.visual.blocks.0.extra": torch.zeros(1),
            "vlm.model.visual.blocks.1.extra": torch.zeros(1),
            K_PROJ: tensors[K_PROJ].T.contiguous(),
            "expert.norm.weight": tensors["expert.norm.weight"].double(),
        },
        **{name: tensors[name][:7].clone() for name in names},
    )
    save_file({"vlm.lm_head.weight": lm_head, "expert.norm.weight": torch.zeros(3)}, tmp_path / "over.safetensors")
    over = f"overlay {tmp_path / 'over.safetensors'}: "
    assert sorted(problems_of(one, overlay=tmp_path / "over.safetensors")) == sorted(
        [
            "missing: vlm.model.visual.merger.norm.bias",
            "unexpected: vlm.model.visual.blocks.{0-1}.extra",
            "vocabulary: config.json says 'vocab_size' 4472, the table has 444 rows".join(["vlm.lm_head.weight: ", ""]),
            f"{K_PROJ}: shape [32, 48] is required, found [48, 32]",
            "vlm.model.language_model.layers.{0-3}.mlp.up_proj.weight: shape [160, 64] is required, found [7, 64]",
            "expert.norm.weight: one of BF16, F16, F32 is required, found F64",
            f"{over}unexpected: vlm.lm_head.weight",
            f"{over}only tensors of the model that start with expert., action_in_proj., action_out_proj. may be "
            "replaced",
            f"{over}expert.norm.weight: shape [48] is required, found [3]",
        ]
    )


@given(numbers=st.sets(st.integers(0, 60), min_size=1))
def test_collapsed_names_name_every_layer(numbers: set[int]) -> None:
    (name,) = collapse([f"a.{i}.b.0.c" for i in sorted(numbers)])
    listed = name.removeprefix("a.").removesuffix(".b.0.c").strip("{}")
    runs = [tuple(map(int, part.split("-"))) for part in listed.split(",")]
    assert {i for run in runs for i in range(run[0], run[-1] + 1)} == numbers


def test_index_and_shards_disagree(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, *_, last = sorted(set(weight_map.values()))
    name = next(name for name, shard in weight_map.items() if shard == first)
    shutil.copyfile(shards / last, shards / "model-00099-of-00099.safetensors")
    edit_json(index, weight_map=weight_map | {name: last})
    assert sorted(problems_of(shards)) == sorted(
        [
            f"{first}: {name}: the file holds it, the index does not put it here",
            f"{last}: {name}: the index puts it here, the file does not hold it",
            "model-00099-of-00099.safetensors: a shard that model.safetensors.index.json does not name",
        ]
    )


def test_tensor_in_two_shards(shards: Path) -> None:
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    shutil.copyfile(first, second)
    assert any(f"in {first.name} and again in {second.name}" in problem for problem in problems_of(shards))


@pytest.mark.parametrize("bad", ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", ""])
def test_index_reaches_no_other_directory(shards: Path, bad: str) -> None:
    edit_json(shards / "model.safetensors.index.json", weight_map={K_PROJ: bad})
    assert any("in the same directory are required" in problem for problem in problems_of(shards))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_unusable_index(shards: Path, text: str) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    (problem,) = problems_of(shards)
    assert "an object with 'weight_map' (tensor to file name) is required" in problem


def test_shards_without_or_with_two_indices(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    shutil.copyfile(index, shards / "other.safetensors.index.json")
    assert "one *.safetensors.index.json is required, found model" in problems_of(shards)[0]
    index.unlink()
    (shards / "other.safetensors.index.json").unlink()
    assert "safetensors files need a *.safetensors.index.json, found none" in problems_of(shards)[0]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"vlm.lm_head.weight": torch.zeros(4472, 64)}, "unexpected: vlm.lm_head.weight"),
        ({"expert.layers.99.input_layernorm.weight": torch.zeros(48)}, "unexpected: expert.layers.99"),
        ({"expert.norm.weight": torch.zeros(48, dtype=torch.int32)}, "one of BF16, F16, F32 is required, found I32"),
        ({"action_out_proj.bias": torch.zeros(3)}, "shape [2] is required, found [3]"),
        ({}, "holds no tensor"),
    ],
)
def test_bad_overlay(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    save_file(tensors, tmp_path / "over.safetensors")
    assert any(reason in problem for problem in problems_of(BUNDLED, overlay=tmp_path / "over.safetensors"))


def test_overlay_that_is_not_there(tmp_path: Path) -> None:
    assert problems_of(BUNDLED, overlay=tmp_path / "x.safetensors") == [
        f"overlay {tmp_path / 'x.safetensors'}: x.safetensors: required, not found"
    ]


def test_file_cut_while_it_is_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes through, the threads end, and nothing waits forever."""
    victim = sorted(shards.glob("*.safetensors"))[-1]

    def cut_first(slot: TensorSlot, target: torch.Tensor) -> torch.Tensor:
        if victim.stat().st_size == size:
            os.truncate(victim, size - 2000)
        return place_of(slot, target)

    # One buffer, so that the last file is still unread when the first piece is copied.
    size = victim.stat().st_size
    monkeypatch.setattr("flashdrive_node.model.checkpoint._READERS", 1)
    monkeypatch.setattr("flashdrive_node.model.checkpoint._BUFFERS", 1)
    monkeypatch.setattr("flashdrive_node.model.checkpoint.place_of", cut_first)
    with pytest.raises(CheckpointError, match="bytes when it was checked"):
        load(shards)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_failing_copy_ends_the_readers(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    config = read_config(shards)
    monkeypatch.setattr("flashdrive_node.model.checkpoint._BUFFERS", 2)
    monkeypatch.setattr("flashdrive_node.model.checkpoint.materialise", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        load(shards, config=config)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_model_and_slots_must_agree() -> None:
    model = Alpamayo.on_meta(read_config(BUNDLED), torch.bfloat16)
    slots = [slot for slot in release_slots(model.config) if slot.name != K_PROJ]
    with pytest.raises(ValueError, match=r"expert\.layers\.1\.qkv\.weight: 4608 elements .* 6144 in the model"):
        load_weights(model, slots, BUNDLED, "cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llama"}, "key 'model_type' must be 'alpamayo1_5' or 'alpamayo_r1', found 'llama'"),
        ({"model_type": "llama", "vlm_name_or_path": None}, "key 'vlm_name_or_path' .* is required, found None"),
        ({"vlm_name_or_path": "../vlm_gone"}, r"\(tried .*vlm_gone first\): no such directory"),
        ({"vlm_name_or_path": "/nowhere/vlm"}, "no such directory"),
    ],
)
def test_config_of_another_architecture(one: Path, changes: dict[str, Any], reason: str) -> None:
    edit_json(one / "config.json", **changes)
    with pytest.raises((ConfigError, CheckpointError), match=reason):
        read_config(one)


def test_backbone_of_another_architecture(one: Path) -> None:
    edit_json(one.parent / "vlm_stub" / "config.json", model_type="qwen2_5_vl")
    with pytest.raises(ConfigError, match="backbone: key 'model_type' must be 'qwen3_vl', found 'qwen2_5_vl'"):
        read_config(one)


def test_several_problems_of_a_config_at_once(one: Path) -> None:
    edit_json(one / "config.json", vocab_size="many", traj_token_ids=None)
    with pytest.raises(ConfigError) as caught:
        read_config(one)
    assert len(caught.value.problems) >= 2


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "not JSON"), ("[1]", "a JSON object is required"), (None, "No such")]
)
def test_unusable_config_file(one: Path, text: str | None, reason: str) -> None:
    path = one / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_config(one)


def test_wrong_vocabulary_size(one: Path) -> None:
    """The configuration's vocabulary is larger than the tables: both tables are named."""
    edit_json(one / "config.json", vocab_size=4480)
    with pytest.raises(CheckpointError) as caught:
        load(one)
    assert sorted(caught.value.problems) == [
        f"vlm.{name}.weight: vocabulary: config.json says 'vocab_size' 4480, the table has 4472 rows"
        for name in ("lm_head", "model.language_model.embed_tokens")
    ]
