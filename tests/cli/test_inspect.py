"""`flashdrive inspect` says what is there, from headers alone, and lists what is wrong."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashdrive_node.cli.inspect import examine, render
from flashdrive_node.cli.main import main
from flashdrive_node.model.checkpoint_writer import random_checkpoint, save_checkpoint
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.footprint import PRECISIONS, cache_bytes_per_token, part_of, weight_bytes
from flashdrive_node.model.presets import PROMPT_TEXT_TOKENS, alpamayo_1_5_10b, alpamayo_r1_10b
from flashdrive_node.model.source import read_config
from flashdrive_node.model.state_dict import release_slots
from support.checkpoints import BUNDLED, STUB, edit_json, release_tensors
from support.small_models import random_model, small_config


def inspect_json(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["inspect", str(directory), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_bundled_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = inspect_json(BUNDLED, capsys)
    assert code == 0
    assert report["problems"] == []
    assert report["model_type"] == "alpamayo1_5"
    tensors = release_tensors(BUNDLED)
    assert sum(part["tensors"] for part in report["parts"]) == len(tensors)
    for part in report["parts"]:
        own = [t for name, t in tensors.items() if part_of(name) == part["part"]]
        assert part["parameters"] == sum(t.numel() for t in own)
        assert part["bytes"] == sum(t.nbytes for t in own)
    assert [file["bytes"] for file in report["files"]] == [(BUNDLED / "model.safetensors").stat().st_size]
    assert report["tokenizer"]["vocabulary"] == 4472
    assert (report["prompt"]["width"], report["prompt"]["height"], report["prompt"]["image_tokens"]) == (576, 320, 180)
    assert report["memory"]["cache_bytes_per_token"] == 2 * 4 * 2 * 16 * 2


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(BUNDLED)]) == 0
    out = capsys.readouterr().out
    for text in ("vision tower", "text layers", "1,105,058", "model.safetensors", "bfloat16", "No problems found."):
        assert text in out
    assert max(map(len, out.splitlines())) <= 130


@pytest.mark.parametrize(("preset", "prompt"), [(alpamayo_1_5_10b, 3086), (alpamayo_r1_10b, 3006)])
def test_published_figures(preset: Callable[[], AlpamayoConfig], prompt: int) -> None:
    config = preset()
    slots = release_slots(config)
    sizes = {p.name: weight_bytes(slots, p) for p in PRECISIONS}
    assert sizes["bfloat16"] == 22_157_052_388
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert cache_bytes_per_token(config) == 147_456
    assert PROMPT_TEXT_TOKENS[config.model_type] + config.tokens_per_history_traj + 16 * 180 == prompt

    # 8 and 4 bit, counted another way: what the matrices of the parts save, and what their scales cost.
    parts = ("vision tower", "text layers", "lm_head", "action expert")
    matrices = [s for s in slots if len(s.shape) == 2 and part_of(s.name) in parts and "pos_embed" not in s.name]
    weights = sum(math.prod(s.shape) for s in matrices)
    assert sizes["fp8"] == sizes["bfloat16"] - weights + 4 * sum(s.shape[0] for s in matrices)
    text = [s for s in matrices if part_of(s.name) == "text layers"]
    groups = sum(s.shape[0] * s.shape[1] // 128 for s in text)
    # q/k/v, gate/up, o_proj and down each have one input.
    inputs = config.text.num_layers * (2 * config.text.hidden_size + config.text.q_size + config.text.intermediate_size)
    half = sum(math.prod(s.shape) for s in text) // 2 + 4 * sum(s.shape[0] for s in text)
    rotation = 42 + 41 + 512  # as the files have it, step by step for kernels, and as matrices for many rows
    assert sizes["w4a8, w4a16"] == sizes["fp8"] - half + 3 * groups + rotation * inputs


def test_sharded_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(r1=True)
    directory = save_checkpoint(random_model(config, 0), config, tmp_path / "r1", 100_000)
    code, report = inspect_json(directory, capsys)
    assert len(report["files"]) > 2
    # It has no tokenizer, which is the only thing to be said against it, and memory can be told all the same.
    assert code == 1
    (problem,) = report["problems"]
    assert "tokenizer.json, or vocab.json and merges.txt, is required" in problem
    assert report["prompt"]["tokens"] == 3006
    assert "Problems (1)" in render(report)


def test_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(STUB, tmp_path / "vlm_stub")
    directory = Path(shutil.copytree(BUNDLED, tmp_path / "checkpoint"))
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-50].replace(b"expert.norm.weight", b"expert.gnom.weight"))
    (tmp_path / "vlm_stub" / "tokenizer.json").write_text("{}")
    code, report = inspect_json(directory, capsys)
    assert code == 1
    text = "\n".join(report["problems"])
    for part in ("truncated", "missing: expert.norm.weight", "unexpected: expert.gnom.weight", "tokenizer.json"):
        assert part in text


def test_unusable_configuration_still_shows_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(STUB, tmp_path / "vlm_stub")
    directory = Path(shutil.copytree(BUNDLED, tmp_path / "checkpoint"))
    edit_json(directory / "config.json", model_type="llama")
    assert main(["inspect", str(directory)]) == 1
    out = capsys.readouterr().out
    assert "key 'model_type' must be 'alpamayo1_5' or 'alpamayo_r1', found 'llama'" in out
    assert "1,105,058" in out


def test_nothing_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "/no/such/checkpoint"]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_weights_are_not_read(tmp_path: Path) -> None:
    """A file whose tensors are a hole on the disk is as good as any."""
    config = read_config(BUNDLED)
    directory = random_checkpoint(config, tmp_path / "c", tokenizer_files_dir=STUB)
    path = directory / "model.safetensors"
    size, header = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as file:
        file.truncate(header)
        file.truncate(size)
    assert examine(directory)["problems"] == []
