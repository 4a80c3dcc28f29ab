"""``flashdrive replay`` as a user runs it: node, player and recorder as processes, over real DDS."""

import argparse
import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from std_msgs.msg import String

from flashdrive_node.cli import replay as command
from flashdrive_node.evaluation.drive_picture import HEIGHT, WIDTH
from flashdrive_node.evaluation.replay_report import read_outputs
from flashdrive_node.evaluation.video import RATE_HZ, read_drive, write_video
from flashdrive_node.evaluation.world_bag import CAMERA_DELAY_NS, START_NS
from flashdrive_node.runtime.bag import open_bag
from flashdrive_node.runtime.rig import Rig
from support.commands import run, start, stop
from support.node_process import Bench, own_domain_id

pytestmark = pytest.mark.ros

CLI = "flashdrive_node.cli.main"
QUICK = ("--quiet", "--set", "fake.latency_s=0.02", "--set", "diagnostics_period_s=0.2")


@dataclass(frozen=True)
class Finished:
    """A replay that ran to its end."""

    said: subprocess.CompletedProcess[str]
    report: dict[str, Any]
    folder: Path
    outputs: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drive: Path) -> Finished:
    folder = tmp_path_factory.mktemp("replay")
    outputs = folder / "OUT.mcap"
    said = run(folder, CLI, "replay", drive, *QUICK, "--record", outputs, "--report", folder / "report")
    assert said.returncode == 0, said.stdout + said.stderr
    report = json.loads((folder / "report" / "report.json").read_text())
    return Finished(said, report, folder / "report", outputs)


def test_one_result_per_window_with_the_right_frames(finished: Finished, rig: Rig) -> None:
    records = read_outputs(finished.outputs).records
    # The first window needs 1.5 s of odometry; then there is one per frame of the cameras, up to 4.0 s.
    windows = finished.report["published"] + sum(finished.report["dropped"].values())
    assert 24 <= windows <= 26
    assert len(records) == finished.report["published"] >= 8
    assert len({r["t0_ns"] for r in records}) == len(records)
    for record in records:
        t0_ns = record["t0_ns"]
        assert (t0_ns - START_NS) % 100_000_000 == 0
        wanted = [t0_ns - k * 100_000_000 for k in (3, 2, 1, 0)]
        assert record["frame_stamps_ns"] == {camera.name: wanted for camera in rig.cameras}
        assert re.fullmatch(r"Turn left in \d+m", record["nav_text"])


def test_every_frame_is_accounted_for(finished: Finished, rig: Rig) -> None:
    for camera in rig.cameras:
        frames = dict(finished.report["frames"][camera.name])
        assert frames.pop("received") == sum(frames.values())
        assert finished.report["played"]["messages"][camera.topic] == 41


def test_figures_are_of_this_run(finished: Finished) -> None:
    report = finished.report
    assert report["age_ms"]["p50"] >= CAMERA_DELAY_NS / 1e6 + 20.0
    assert report["age_ms"]["p50"] <= report["age_ms"]["p95"] <= report["age_ms"]["max"]
    assert report["latency_ms"]["engine"]["p50"] >= 20.0
    assert report["latency_ms"]["engine"]["count"] == report["published"]
    assert 0.0 < report["distance_to_driven_m"]["1 s"] < 1.0
    assert report["engine"]["name"].startswith("fake")
    assert any("without a model" in note for note in report["notes"])
    assert report["problem"] == ""
    assert f"windows      {report['published']} published" in finished.said.stdout


def test_recorded_bag_holds_all_outputs_in_time_with_the_drive(finished: Finished, drive: Path) -> None:
    with open_bag(finished.outputs) as reader:
        topics = {topic.removeprefix("/flashdrive_node/"): info.msgcount for topic, info in reader.topics.items()}
        # Stamped with /clock, which runs on for half a second of the wall clock after the drive.
        assert START_NS <= reader.start_time < START_NS + 3_000_000_000
        assert START_NS + 3_000_000_000 < reader.end_time < START_NS + 6_000_000_000
    results = topics["output/record"]
    for name in ("output/path", "output/trajectory", "output/trajectory_samples", "output/reasoning", "debug/timing"):
        assert topics[name] == results
    assert topics["/diagnostics"] >= 2


def test_page_needs_no_other_file(finished: Finished) -> None:
    text = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"src='([^']{22})", text) == ["data:image/png;base64,"]
    assert "http" not in text
    assert "without a model" in text
    picture = cv2.imread(str(finished.folder / "summary.png"))
    assert picture is not None
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_video_shows_the_newest_published_window_at_every_moment(
    finished: Finished, drive: Path, rig: Rig, tmp_path: Path
) -> None:
    replayed = read_drive(drive, rig, read_outputs(finished.outputs).records, "a note")
    written: list[int] = []
    count = write_video(tmp_path / "video.mp4", drive, replayed, written.append)
    assert count == 41
    assert written == list(range(1, 42))
    video = cv2.VideoCapture(str(tmp_path / "video.mp4"))
    pictures = []
    while (read := video.read())[0]:
        pictures.append(read[1])
    assert [p.shape for p in pictures] == [(HEIGHT, WIDTH, 3)] * count
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(RATE_HZ)
    # Cameras, plan view and the words below change as the drive goes on.
    first, last = pictures[0].astype(int), pictures[-1].astype(int)
    for part in (np.s_[:374, :672], np.s_[:748, 1344:], np.s_[760:900, :1344]):
        assert np.abs(first[part] - last[part]).mean() > 1
    for record in replayed.records:
        newest = replayed.newest(record["published_ns"])
        assert newest is not None
        assert newest["t0_ns"] >= record["t0_ns"]
        assert newest["published_ns"] <= record["published_ns"]
    assert replayed.newest(START_NS) is None


def test_report_compares_paths_and_texts_with_the_truth_of_the_recording(finished: Finished) -> None:
    # The recording ends before any window's path of 6.4 s does.
    assert finished.report["ade_m"].keys() == {"1 s"}
    assert 0.0 < finished.report["ade_m"]["1 s"] < finished.report["distance_to_driven_m"]["1 s"] < 1.0
    # The stand-in says what it is, which is no sentence of the world.
    reasoning = finished.report["reasoning"]
    assert reasoning == {
        "compared": finished.report["published"],
        "same_cause": 0.0,
        "same_decision": 0.0,
        "malformed": 1.0,
    }
    assert "ground truth" in (finished.folder / "report.html").read_text(encoding="utf-8")


def test_nothing_published_is_a_failure_and_says_why(tmp_path: Path, drive: Path) -> None:
    said = run(tmp_path, CLI, "replay", drive, *QUICK, "--set", "fake.fault=nan", "--duration", 2.5)
    assert said.returncode == 1, said.stdout + said.stderr
    assert "windows      0 published, withheld not_finite" in said.stdout
    assert "inference: withheld" in said.stdout
    assert "nothing was published" in said.stderr


def children(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The processes that a replay started, by module."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        command_line = child.cmdline()
        if "-m" in command_line:
            found[command_line[command_line.index("-m") + 1].rsplit(".", 1)[1]] = child
    return found


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    participant = Bench(own_domain_id())
    yield participant
    participant.close()


def wait_for_results(process: subprocess.Popen[str], bench: Bench) -> dict[str, psutil.Process]:
    """The processes of the replay, once it has published a few windows."""
    got: list[str] = []
    bench.node.create_subscription(String, "/flashdrive_node/output/record", lambda m: got.append(m.data), 10)
    deadline = time.monotonic() + 60.0
    while len(got) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return children(process)


def test_a_node_that_dies_ends_the_run(tmp_path: Path, drive: Path, bench: Bench) -> None:
    process = start(tmp_path, CLI, "replay", drive, *QUICK, "--loop", "--record", tmp_path / "out")
    found = wait_for_results(process, bench)
    found["main"].kill()
    out, err = process.communicate(timeout=30.0)
    assert process.returncode == 1, out + err
    assert "the node ended with exit code -9" in err
    assert not any(child.is_running() for child in found.values())
    assert read_outputs(tmp_path / "out").records


def test_ctrl_c_finishes_the_recording_and_leaves_nothing_behind(tmp_path: Path, drive: Path, bench: Bench) -> None:
    process = start(tmp_path, CLI, "replay", drive, *QUICK, "--loop", "--record", tmp_path / "out")
    found = wait_for_results(process, bench)
    said = stop(process, signal.SIGINT)
    assert said.returncode == 130, said.stdout + said.stderr
    assert "Traceback" not in said.stderr
    assert set(found) == {"main", "player", "recorder"}
    assert not any(child.is_running() for child in found.values())
    assert read_outputs(tmp_path / "out").records
    assert "published" in said.stdout


def test_sigterm_leaves_nothing_behind(tmp_path: Path, drive: Path, bench: Bench) -> None:
    process = start(tmp_path, CLI, "replay", drive, *QUICK, "--loop", "--rate", 2)
    found = wait_for_results(process, bench)
    said = stop(process, signal.SIGTERM)
    assert said.returncode == 128 + signal.SIGTERM, said.stdout + said.stderr
    assert set(found) == {"main", "player", "recorder"}
    assert not any(child.is_running() for child in found.values())


def test_bad_requests_end_with_one_message(tmp_path: Path, drive: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    for arguments, message in (
        ([tmp_path / "none"], "a rosbag2 directory or file is required"),
        ([drive, "--record", taken], "a new directory is required for the recorded outputs"),
        ([drive, "--rig", "none_such"], "no rig of this name"),
        ([drive, "--rig", "autoware"], "does not fit the rig 'autoware'"),
        ([drive, "--set", "seed"], "--set takes NAME=VALUE, found 'seed'"),
        ([drive, "--set", "num_samples=0"], "parameter 'num_samples' must be 1 to 64"),
    ):
        said = run(tmp_path, CLI, "replay", *arguments, "--quiet")
        assert said.returncode == 2, (arguments, said.stdout, said.stderr)
        assert message in said.stderr
        assert "flashdrive replay: " in said.stderr


def test_engine_is_chosen_from_what_is_given() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def chosen(*arguments: str) -> dict[str, object]:
        return command.node_parameters(parser.parse_args(["bag", *arguments]))

    assert chosen() == {"engine": "fake"}
    assert chosen("--checkpoint", "12") == {"engine": "plain", "checkpoint": "12"}
    assert chosen("--params", "node.yaml") == {}
    assert chosen("--params", "node.yaml", "--engine", "fake") == {"engine": "fake"}
    assert chosen("--set", "engine=streaming") == {"engine": "streaming"}
    assert chosen("--set", "engine=streaming", "--engine", "fake") == {"engine": "fake"}
    assert chosen("--set", "seed=3", "--set", "device=cpu") == {"engine": "fake", "seed": 3, "device": "cpu"}
