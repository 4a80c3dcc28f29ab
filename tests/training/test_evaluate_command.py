"""`flashdrive evaluate` and `flashdrive ablate` from the command line: a tiny model over a small recording."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdrive_node.cli.main import main
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.fp8 import Fp8Linear
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.training.drafter_files import drafter_config, new_drafter, save_drafter
from support.driven_bag import RIG, write_bag
from support.quantised import NARROW, plain_model


@pytest.fixture
def checkpoint(model, tokenizer_files, tmp_path) -> Path:
    return save_checkpoint(model, model.config, tmp_path / "checkpoint", tokenizer_files_dir=tokenizer_files)


@pytest.fixture
def options(tmp_path) -> list[str]:
    bag = write_bag(tmp_path / "drive", 8.0)
    rig = tmp_path / "rig.yaml"
    cameras = [
        {"name": c.name, "index": c.index, "topic": c.topic, "transport": "raw", "rate_hz": 10.0} for c in RIG.cameras
    ]
    rig.write_text(json.dumps({"name": "r", "odometry_topic": "/odometry", "cameras": cameras}))
    return ["--bag", str(bag), "--rig", str(rig), "--samples", "2", "--max-generation-length", "6", "--device", "cpu"]


def test_evaluate(checkpoint, options, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["evaluate", str(checkpoint), *options, "--windows", "1", "--out", str(out)]
    assert main(command) == 0
    content = json.loads((out / "evaluation.json").read_text())
    # Windows at 1.5 and 1.6 s.
    assert (content["clips"], content["windows"], content["scored"]) == (2, 2, 2)
    assert content["errors"]["ade@6.4s"][0] > 0
    assert content["settings"]["source"] == "bags drive"
    assert {p.name for p in (out / "clips").iterdir()} == {
        f"drive-000{i}.{end}" for i in (0, 1) for end in ("json", "jpg")
    }
    before = {p: p.stat().st_mtime_ns for p in (out / "clips").iterdir()}
    assert main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (out / "clips").iterdir()}
    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2
    assert "holds results of other settings:\n  seed: 1 is required, found None" in capsys.readouterr().err
    other = ["evaluate", str(checkpoint), *options, "--windows", "1", "--engine", "streaming", "--stream-mode", "full"]
    assert main([*other, "--out", str(tmp_path / "full"), "--baseline", str(out)]) == 0
    # The streaming engine that keeps nothing is the plain one: the same seeds, the same noise, the same paths.
    assert "| ADE, one sample | +0.0% [+0.0%, +0.0%]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter", "nowhere"], "--drafter: --engine streaming is required"),
        (["--world", "test:0"], "one of --bag, --world and --physical-ai is required"),
        (["--shard", "2/2"], "INDEX/COUNT"),
        (["--sabotage", "cache"], "--engine streaming --stream-mode kv is required"),
        (["--rig", "nobody"], "no rig of this name"),
    ],
)
def test_options_that_do_not_go_together(checkpoint, options, tmp_path, capsys, arguments, message) -> None:
    assert main(["evaluate", str(checkpoint), *options, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_sabotaged_run_says_so(checkpoint, options, tmp_path) -> None:
    command = ["evaluate", str(checkpoint), *options, "--windows", "2", "--samples", "1", "--temperature", "0"]
    command += ["--engine", "streaming", "--stream-mode", "kv", "--sabotage", "cache", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["settings"]["source"] == "bags drive, sabotaged: cache"
    assert content["scored"] == 2
    # The first window of the clip was looked at, at each of its ten steps but the first.
    assert [len(row) for row in content["velocity_change"]] == [3] * 9


def test_a_report_needs_results(tmp_path, capsys) -> None:
    (tmp_path / "clips").mkdir()
    assert main(["evaluate", "--report-only", "--out", str(tmp_path)]) == 2
    assert "a folder that `flashdrive evaluate` wrote is required" in capsys.readouterr().err


def test_ablate(checkpoint, options, model, tmp_path, capsys) -> None:
    save_drafter(new_drafter(drafter_config(model.config), model, 0), tmp_path / "drafter")
    out = tmp_path / "out"
    names = ["plain", "features", "kv", "speculative", "flow"]
    files = ["--drafter", str(tmp_path / "drafter"), "--flow-schedule", "4:0,3"]
    command = ["ablate", str(checkpoint), *options, *files, "--temperature", "0", "--out", str(out)]
    assert main([*command, "--configurations", *names]) == 0
    content = json.loads((out / "ablation.json").read_text())
    assert list(content) == names
    # What keeps images' features, or guesses tokens, is the plain function, and is answered by its engine alone.
    for name in ("features", "speculative"):
        assert content[name]["settings"]["same_as"] == "plain"
        assert content[name]["compared"]["ade@6.4s"][1][0] == 0
        assert not list((out / name / "clips").iterdir())
    assert content["speculative"]["metrics"]["accept_length"] >= 1
    assert content["flow"]["settings"]["flow_schedule"] == "4:0,3"
    assert "drafter" not in content["flow"]["settings"]
    # Side by side or one by one, every engine says and plans the same.
    for name in names:
        agreed = content[name]["engine_agrees"]
        assert (agreed["windows"], agreed["texts"]) == (2, 1.0), name
        assert agreed["ade_m"] < 1e-3
    table = (out / "ablation.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:7]] == names
    assert "- features is the function of plain" in table
    assert (out / "ablation.png").stat().st_size > 5000
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/clips/*.json")}
    assert main([*command, "--configurations", "plain", "kv"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/clips/*.json")}
    capsys.readouterr()
    assert main([*command, "--configurations", "plain", "kv-tuned"]) == 2
    assert "configuration 'kv-tuned' requires --overlay, found none" in capsys.readouterr().err
    assert main([*command, "--workers", "0"]) == 2
    assert "--workers must be at least 1, found 0" in capsys.readouterr().err


def test_precisions_side_by_side(options, tmp_path, capsys) -> None:
    """Quantise by both methods, then one table of all precisions."""
    model = plain_model(tmp_path / "tokenizer", NARROW | {"layers": 1})
    plain = save_checkpoint(model, model.config, tmp_path / "p", tokenizer_files_dir=tmp_path / "tokenizer")
    clips = [*options[:4], "--device", "cpu"]
    for method in ("paroquant", "nearest"):
        command = ["quantize", str(plain), str(tmp_path / method), "--method", method, *clips, "--limit", "2"]
        assert main([*command, "--stride", "1", "--rows", "8", "--steps", "2"]) == 0
    out = tmp_path / "out"
    fours = [
        f"w4a8={tmp_path / 'paroquant'}",
        f"w4a16={tmp_path / 'paroquant'}",
        f"nearest={tmp_path / 'nearest'},w4a8",
    ]
    command = ["ablate", str(plain), *options, "--temperature", "0", "--windows", "1", "--out", str(out)]
    assert main([*command, "--precisions", "bf16", "fp8", *fours]) == 0
    content = json.loads((out / "ablation.json").read_text())
    assert list(content) == ["bf16", "fp8", "w4a8", "w4a16", "nearest"]
    for name, one in content.items():
        assert one["settings"]["precision"] == ("w4a8" if name == "nearest" else name)
        assert one["settings"]["same_as"] == name
        assert ("changed" in one["texts"]) == (name != "bf16")
    assert content["fp8"]["errors"] != content["bf16"]["errors"] != content["w4a8"]["errors"]
    assert "| changed |" in (out / "ablation.md").read_text()
    capsys.readouterr()
    assert main([*command, "--precisions", "bf16", "bf16=x"]) == 2
    assert "different names of letters, digits and dashes are required" in capsys.readouterr().err
    assert main([*command, "--precisions", "bf16", "--configurations", "plain"]) == 2
    assert "--precisions or --configurations is required, found both" in capsys.readouterr().err


def test_an_overlay_is_calibrated_with_the_checkpoint(options, tmp_path) -> None:
    model = plain_model(tmp_path / "tokenizer", NARROW | {"layers": 1})
    plain = save_checkpoint(model, model.config, tmp_path / "p", tokenizer_files_dir=tmp_path / "tokenizer")
    rows = model.expert.config.q_size
    queries = torch.randn(rows, model.expert.config.hidden_size, generator=torch.Generator().manual_seed(0))
    save_file({"expert.layers.0.self_attn.q_proj.weight": queries}, tmp_path / "overlay.safetensors")
    command = ["quantize", str(plain), str(tmp_path / "out"), *options[:4], "--limit", "2", "--stride", "1"]
    command += ["--device", "cpu", "--preset", "expert=fp8", "--overlay", str(tmp_path / "overlay.safetensors")]
    assert main(command) == 0
    layer = load_alpamayo(tmp_path / "out", dtype=torch.float32).model.expert.layers[0].qkv
    assert isinstance(layer, Fp8Linear)
    found = layer.dequantised()
    # No value moves by more than rounding and making up for others' does.
    assert (found[:rows] - queries).norm() < 0.1 * queries.norm()
    assert (found[rows:] - model.expert.layers[0].qkv.weight[rows:]).norm() < 0.1 * found[rows:].norm()
