"""Drafters side by side: where they look, where the model thinks, how fast it is, and the whole command."""

import json

import numpy as np
import pytest
import torch

from flashdrive_node.cli.main import main
from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.drafter_config import PARTS
from flashdrive_node.engine.prompt_slots import prompt_room
from flashdrive_node.evaluation.bag_clips import BagClips
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.errors import InputError
from flashdrive_node.training.deliberation import deliberation
from flashdrive_node.training.draft_attention import attention_shares
from flashdrive_node.training.drafter_files import drafter_config, new_drafter
from flashdrive_node.training.rollouts import Rollouts, RolloutSettings
from flashdrive_node.training.text_records import TextRecorder
from support.driven_bag import RIG, write_bag

LENGTH, BLOCK, CONTEXT = 6, 4, 2
CALM = RolloutSettings(lanes=2, reset=0.0, drop=0.0, refresh_every=(0,), refresh_views=0.0)


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bags")
    return [write_bag(folder / f"{i}", 8.5, shade=lambda t, i=i: round(t * (7 + i)) % 200) for i in range(3)]


@pytest.mark.parametrize("parts", [(), ("history",), PARTS], ids=len)
def test_shares_of_attention(model, tokenizer, bags, parts) -> None:
    """Without keys that differ, attention is spread evenly over what is seen: shares are counts."""
    shape = drafter_config(model.config, 2, 16, BLOCK, CONTEXT, None, "flat" if parts else "local", parts)
    drafter = new_drafter(shape, model, 1)
    with torch.no_grad():
        for layer in drafter.layers:
            layer.qkv.weight.zero_()
    policy = BatchedPolicy(model, tokenizer, temperature=0.0, cameras=(0, 1), max_length=LENGTH)
    recorder = TextRecorder(policy, shape.target_layer_ids, prompt_room(tokenizer, model.config), shape.image_cells)
    records = next(Rollouts(policy, BagClips(bags[:2], RIG), CALM, seed=0, recorder=recorder)).records
    found = attention_shares(drafter, recorder, records)
    prompt, nav = recorder.prompt, int(records.navigation[0])
    counts = {
        "images": len(prompt.images) * 6,
        "history": model.config.tokens_per_history_traj,
        "navigation": nav,
        "instruction": len(prompt.ids) - prompt.history_span[1],
    }
    seen = {part: counts[part] if part in parts else 0 for part in PARTS} | {"last states": CONTEXT, "block": BLOCK}
    assert found == pytest.approx({part: n / sum(seen.values()) for part, n in seen.items()})


def test_deliberation_beside_changes_and_anywhere() -> None:
    clips = np.repeat(np.arange(20), 10)
    changed = np.tile(np.arange(10) < 3, 20)
    tokens = np.full(200, 10)
    where = np.where(changed, 6, 2)
    found = deliberation(where, tokens, changed, clips, shuffles=200)
    assert (found.share_at_changes, found.share_elsewhere) == (0.6, 0.2)
    assert (found.windows_at_changes, found.windows) == (60, 200)
    assert found.p_value == pytest.approx(1 / 201)
    anywhere = np.random.default_rng(0).integers(0, 6, 200)
    assert deliberation(anywhere, tokens, changed, clips, shuffles=200).p_value > 0.05
    # The other way round is no evidence for it.
    assert deliberation(8 - where, tokens, changed, clips, shuffles=200).p_value > 0.95
    calm = deliberation(where, tokens, changed & False, clips)
    assert (calm.share_at_changes, calm.p_value) == (None, None)
    assert calm.share_elsewhere == pytest.approx(where.sum() / 2000)
    with pytest.raises(InputError, match="figures of as many windows are required"):
        deliberation(where[:3], tokens, changed, clips)


def test_the_command(model, tokenizer_files, bags, tmp_path, capsys) -> None:
    checkpoint = save_checkpoint(model, model.config, tmp_path / "checkpoint", tokenizer_files_dir=tokenizer_files)
    rig = tmp_path / "rig.yaml"
    cameras = [
        {"name": c.name, "index": c.index, "topic": c.topic, "transport": "raw", "rate_hz": 10.0} for c in RIG.cameras
    ]
    rig.write_text(json.dumps({"name": "r", "odometry_topic": "/odometry", "cameras": cameras}))
    out = tmp_path / "out"
    arguments = ["train", "drafters", str(checkpoint), str(out), "--bag", *map(str, bags), "--rig", str(rig)]
    arguments += ["--device", "cpu", "--lanes", "1", "--max-length", str(LENGTH), "--texts", "2", "--held-out", "3"]
    arguments += ["--steps", "2", "--batch", "16", "--block", str(BLOCK), "--context", str(CONTEXT)]
    arguments += ["--intermediate-size", "16", "--kinds", "dflash", "routine-flat", "--aarl-steps", "1", "--every", "1"]
    assert main([*arguments, "--timed", "5", "--drafts", "2", "--clips", "1"]) == 0
    rows = json.loads((out / "comparison.json").read_text())["drafters"]
    assert list(rows) == ["n-grams", "dflash", "dflash + AARL", "routine-flat", "routine-flat + AARL"]
    for name, row in rows.items():
        acceptance = row["acceptance"]
        assert 1 <= acceptance["accept_length"][0] <= BLOCK
        assert 0 <= acceptance["routine_share"][0] < 1
        assert ("attention" in row) == (name != "n-grams")
        if name != "n-grams":
            assert sum(row["attention"].values()) == pytest.approx(1)
            assert row["timing"]["windows"] == 1
            assert row["timing"]["tokens_per_s"] > 0
    assert rows["dflash"]["attention"]["history"] == 0 < rows["routine-flat"]["attention"]["history"]
    assert rows["dflash + AARL"]["aarl"]["before"]["test"]["acceptance"] == rows["dflash"]["acceptance"]
    lines = (out / "comparison.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows) + 2
    assert (out / "comparison.png").stat().st_size > 5000
    assert (out / "routine-flat-aarl" / "drafter" / "config.json").is_file()
    assert main(arguments) == 2
    assert "a new or empty directory is required" in capsys.readouterr().err
