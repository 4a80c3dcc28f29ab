"""A stage from start to end, on the CPU, and one that goes on from it."""

import json

import pytest
import torch

from flashdrive_node.cli.main import main
from flashdrive_node.evaluation.history_baseline import load_history_baseline
from flashdrive_node.model.errors import CheckpointError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.training.stage import run_stage
from flashdrive_node.training.vla import TrainingSettings
from support.tiny_dimensions import TINY
from support.two_ranks import steps_of_two_ranks

SETTINGS = TrainingSettings(
    minutes=0.001, batch=1, draws=1, reuse=8.0, buffer=4, chunk=1, first=1, workers=0, scenes=2, validation=1,
    drive_steps=40,
    compiled_pictures=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    out = tmp_path_factory.mktemp("training") / "base"
    return out, run_stage(out, SETTINGS, device="cpu", dims=TINY)


def test_a_stage_writes_what_others_load(stage, capsys):
    out, result = stage
    assert result["windows"] == 1
    assert result["ade_m"] > 0
    assert main(["inspect", str(out / "checkpoint")]) == 0
    assert "No problems found" in capsys.readouterr().out
    loaded = load_alpamayo(out / "checkpoint", "cpu", torch.float32)
    assert loaded.model.config.text.hidden_size == TINY["text_hidden"]
    assert load_history_baseline(out / "history_baseline.safetensors").poses == 16
    log = json.loads((out / "training.json").read_text())
    assert log["result"] == result
    assert log["conditions"]["settings"]["reuse"] == 8.0
    assert log["validation"][-1]["step"] == 8
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_stage_goes_on_from_another(stage, tmp_path):
    out, _ = stage
    run_stage(tmp_path / "next", SETTINGS, device="cpu", resume=out)
    before, after = (load_alpamayo(d / "checkpoint", "cpu", torch.float32).model for d in (out, tmp_path / "next"))
    weights = [(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True) if a.ndim == 2]
    similar = torch.stack([torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in weights if a.any()])
    assert similar.median() > 0.99
    assert not all(torch.equal(a, b) for a, b in weights)
    # So does the baseline, whose weights would otherwise be drawn anew.
    old, new = (load_history_baseline(d / "history_baseline.safetensors") for d in (out, tmp_path / "next"))
    assert torch.cosine_similarity(old.out.weight.flatten(), new.out.weight.flatten(), dim=0) > 0.9


def test_a_used_directory_is_refused(stage, tmp_path):
    out, _ = stage
    with pytest.raises(CheckpointError, match="new or empty directory"):
        run_stage(out, SETTINGS, device="cpu", dims=TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "--minutes must be positive, found 0"),
        (["--own-drives", "1"], "--own-drives must be at least 0 and less than 1, found 1"),
        (["--workers", "-1"], "--workers must be 0 or more, found -1"),
    ],
)
def test_the_command_refuses_bad_options(tmp_path, capsys, options, message):
    assert main(["train", "vla", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_refuses_a_used_directory(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", "vla", str(tmp_path)]) == 2
    assert "a new or empty directory is required" in capsys.readouterr().err


def test_ranks_take_the_same_step(tmp_path):
    first, second = steps_of_two_ranks(tmp_path)
    assert first == second
    weights, norm, clock = first
    assert norm == pytest.approx((0.2**2 + 0.2**2 + 0.1**2) ** 0.5)
    assert clock == pytest.approx(0.4)
    assert all(weight < 0 for weight in weights)
