"""The two commands that run the whole node on what the package carries."""

import json
from pathlib import Path

import cv2
import pytest

from flashdrive_node.bundled import bundled_checkpoint
from flashdrive_node.evaluation.replay_report import read_outputs
from flashdrive_node.runtime.bag import open_bag
from support.commands import run

CLI = "flashdrive_node.cli.main"


@pytest.mark.ros
def test_demo_drives_the_bundled_model_and_leaves_video_bag_and_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    said = run(tmp_path, CLI, "demo", "--out", out, "--seconds", 2.4, "--rate", 0.4, "--quiet", timeout_s=200.0)
    assert said.returncode == 0, said.stdout + said.stderr
    for name in ("demo.mp4", "summary.png", "report.html", "outputs"):
        assert str(out / name) in said.stdout
        assert (out / name).exists()
    report = json.loads((out / "report.json").read_text())
    assert (report["notes"], report["problem"]) == ([], "")
    assert report["engine"]["checkpoint"] == str(bundled_checkpoint())
    assert len(report["engine"]["sha256"]) == 64
    assert report["published"] >= 1
    # The road ahead is free: any model that drives at all is right about that.
    assert report["reasoning"]["compared"] == report["published"]
    assert report["reasoning"]["same_cause"] == 1.0
    assert report["ade_m"]["3 s"] < 0.5
    assert len(read_outputs(out / "outputs").records) == report["published"]
    with open_bag(out / "outputs") as reader:
        assert "/flashdrive_node/output/trajectory" in reader.topics
    video = cv2.VideoCapture(str(out / "demo.mp4"))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 25  # 2.4 s at 10 Hz, both ends


@pytest.mark.ros
def test_overhead_benchmark_measures_every_burst(tmp_path: Path) -> None:
    arguments = ("--seconds", 2, "--width", 320, "--height", 180, "--engine-latency", 0.01)
    said = run(tmp_path, CLI, "benchmark-node", *arguments, "--json", tmp_path / "figures.json")
    assert said.returncode == 0, said.stdout + said.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 10 <= figures["windows"] <= figures["possible"] + 2
    assert figures["received_share"] == pytest.approx(1.0, abs=0.02)
    for name in ("input_to_engine_ms", "engine_to_published_ms"):
        assert 0.0 < figures[name]["p50"] <= figures[name]["p95"] <= figures[name]["max"]
    assert 0.0 < figures["node_cpu_percent"] < 200.0
    for text in ("320x180 JPEG", "newest image received -> engine start", "engine end -> trajectory published"):
        assert text in said.stdout
