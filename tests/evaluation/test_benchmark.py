"""The benchmark command runs both engines on a small checkpoint and says under which conditions."""

import json
from pathlib import Path

import pytest

from flashdrive_node.cli.main import main
from flashdrive_node.evaluation.benchmark import RandomDrive, StageTimes
from flashdrive_node.model.source import read_config

CHECKPOINT = Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"
QUICK = ["--device", "cpu", "--precision", "float32", "--image-size", "180x320", "--tokens", "4"]


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (["--engine", "plain"], "engine: plain"),
        (["--engine", "streaming", "--flow-schedule", "8:0,1,2,7"], "engine: streaming, mode kv, flow schedule 8:0,1"),
    ],
)
def test_table_and_files(tmp_path, capsys, engine, named):
    arguments = ["benchmark", str(CHECKPOINT), *QUICK, *engine, "--samples", "1", "2", "--runs", "2", "--warm-up", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert named in out
    assert "weights: from the checkpoint" in out
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert [m["samples"] for m in report["measurements"]] == [1, 2]
    for measurement in report["measurements"]:
        assert measurement["windows"] == 2
        assert {"images", "encode", "prefill", "decode", "action", "total"} <= measurement["stages"].keys()
        for stage in measurement["stages"].values():
            assert 0 < stage["min_ms"] <= stage["p50_ms"] <= stage["p99_ms"]
    assert (tmp_path / "benchmark.md").read_text().strip() in out


def test_windows_share_all_but_the_newest_frame():
    drive = RandomDrive(read_config(CHECKPOINT), (8, 8), (0, 6), 4)
    one, two = drive.window(5), drive.window(6)
    for before, after in zip(one.cameras, two.cameras, strict=True):
        assert before.stamps_ns[1:] == after.stamps_ns[:-1]
        assert all(a is b for a, b in zip(before.images[1:], after.images[:-1], strict=True))
        assert not any(after.images[-1] is image for image in before.images)
    assert two.t0_ns - one.t0_ns == 100_000_000


def test_percentiles():
    times = StageTimes.of([float(i) for i in range(1, 102)])
    assert (times.p50_ms, times.p99_ms, times.min_ms) == (51, 100, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a checkpoint or --dims is required"),
        (["x", "--dims", "10b"], "either a checkpoint or --dims is required"),
        (["--dims", "10b"], "--dims needs --random-weights or --load-from"),
        (["x", "--image-size", "big"], "--image-size must be HEIGHTxWIDTH, found 'big'"),
        (["x", "--flow-schedule", "8"], "--flow-schedule needs --engine streaming"),
        (["x", "--engine", "streaming", "--flow-schedule", "8:1"], "evaluated steps must start with 0"),
    ],
)
def test_bad_requests_end_with_one_message(capsys, arguments, message):
    assert main(["benchmark", *arguments]) == 2
    assert message in capsys.readouterr().err
