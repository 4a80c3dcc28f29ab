"""World and driving node as processes: either may die, Ctrl-C ends both, and the launch file starts both."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import cv2
import psutil
import pytest

from flashdrive_node.cli.main import main
from flashdrive_node.evaluation.closed_loop_run import RunSettings
from flashdrive_node.ros import world_node
from flashdrive_node.ros.scene_drive import DriveMode
from flashdrive_node.ros.world_run import WorldOptions
from support import commands
from support.node_process import Bench, wait_until
from support.vehicle import Camera, write_rig
from support.world_drives import SLOW_SCENE, driving_node

WORLD = "flashdrive_node.ros.world_node"


@pytest.fixture
def rig(tmp_path) -> Path:
    return write_rig(tmp_path, [Camera("front", 1, width=32, height=16)])


def start_world(folder: Path, rig: Path, *options: object) -> subprocess.Popen[str]:
    arguments = ["--rig", rig, "--first", SLOW_SCENE, "--silence", 2.0, "--ready-timeout", 20.0, "--quiet", *options]
    return commands.start(folder, WORLD, "--out", folder / "out", *arguments)


def result(folder: Path) -> dict:
    return json.loads((folder / "out" / "closed_loop.json").read_text())


@pytest.mark.ros
@pytest.mark.timeout(120)
def test_either_process_may_be_killed(bench: Bench, tmp_path, rig):
    """The world goes without a word and comes again: the node answers it. The node goes: the world says so and ends."""
    with driving_node(bench, tmp_path, rig, engine="fake", fake__latency_s=0.0) as node:
        first = start_world(tmp_path, rig, "--seconds", 60)
        wait_until(lambda: "~/reset was called" in node.output, 40.0, "the first world", lambda: node.output)
        time.sleep(1.0)
        assert first.poll() is None
        first.kill()
        first.wait()
        second = start_world(tmp_path, rig, "--seconds", 0.5, "--scenes", 500)
        wait_until((tmp_path / "out" / "closed_loop.json").exists, 40.0, "a driven scene", lambda: node.output)
        node.kill()
        since_s = time.monotonic()
        out, err = second.communicate(timeout=30.0)
        assert time.monotonic() - since_s < 10.0
    assert second.returncode == 1, out + err
    assert "flashdrive_world: /flashdrive_node has gone: no diagnostics for 2" in err
    assert "it last said" in err
    found = result(tmp_path)
    assert "has gone" in found["problem"]
    driven = found["policies"]["node"]["scenes"]
    assert all(row["following"] == 1.0 for row in driven)
    assert found["windows"]["answered"] == 5 * len(driven) > 0


@pytest.mark.ros
@pytest.mark.timeout(120)
def test_the_command_scores_the_drive_and_ends_with_it(tmp_path, rig):
    common = ("drive", "--ros", "--engine", "fake", "--rig", rig, "--quiet", "--first", SLOW_SCENE)
    options = ("--scenes", 2, "--seconds", 0.5, "--videos", 1, "--out", tmp_path / "out")
    done = commands.run(tmp_path, "flashdrive_node.cli.main", *common, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| scene score |" in done.stdout
    found = result(tmp_path)
    assert [row["index"] for row in found["policies"]["node"]["scenes"]] == [SLOW_SCENE, SLOW_SCENE + 1]
    assert found["windows"]["answered"] == 10
    assert found["windows"]["unanswered"] == {}
    assert found["windows"]["other_inputs"] == 0
    video = cv2.VideoCapture(str(tmp_path / "out" / f"scene_{SLOW_SCENE:05d}.mp4"))
    assert (video.get(cv2.CAP_PROP_FPS), video.get(cv2.CAP_PROP_FRAME_COUNT)) == (5.0, 3.0)

    process = commands.start(tmp_path, "flashdrive_node.cli.main", *common, "--seconds", 60, "--out", tmp_path / "long")
    log = tmp_path / "long" / "node.log"
    wait_until(lambda: log.exists() and "~/reset was called" in log.read_text(), 60.0, "the drive")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 2, "node and world"
    time.sleep(0.5)
    done = commands.stop(process)
    assert done.returncode == 130, done.stdout + done.stderr
    assert "interrupted" in done.stdout
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert json.loads((tmp_path / "long" / "closed_loop.json").read_text())["interrupted"] is True


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "a checkpoint is required with --ros, or --engine fake"),
        (("--engine", "fake", "--replan", "2"), "with --ros there is a plan for every window, found --replan 2"),
        (("--engine", "fake", "--device", "cuda:0,cuda:1"), "one device is required with --ros, found cuda:0,cuda:1"),
        (("--engine", "fake", "--size", "100x64"), "pictures need a width that is a multiple of 8"),
        (("--engine", "fake", "--rig", "nowhere"), "no rig of this name"),
        (("--engine", "fake", "--first", "-3"), "with indices from 0 on, is required, found [-3, -2"),
        (("--engine", "fake", "--answer-timeout", "0"), "answer timeout: more than 0 s is required, found 0.0"),
        (("--engine", "fake", "--policy", "expert"), "with --ros the node drives"),
        (("--engine", "fake", "--videos", "2"), "--videos needs --out"),
    ],
)
def test_wrong_input_ends_before_anything_starts(capsys, options, text):
    assert main(["drive", "--ros", *options]) == 2
    said = capsys.readouterr()
    assert text in said.err
    assert "starting" not in said.out


def test_the_command_line_of_the_world_says_all_its_options(tmp_path):
    options = WorldOptions(
        out=tmp_path,
        run=RunSettings("validation", 2.5, batch=1),
        indices=(7, 8, 9),
        mode=DriveMode(True, 12.0),
        rig="sample",
        driver="/car/flashdrive_node",
        size=(64, 32),
        file_format="png",
        device="cuda:1",
        ready_timeout_s=5.0,
        silence_s=3.0,
        videos=2,
        quiet=True,
    )
    assert world_node.options_of(world_node.arguments(options)) == options


def test_the_launch_file_starts_node_and_world(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support" / "recorded_launch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        import launch

        file = Path(__file__).parents[2] / "launch" / "closed_loop.launch.py"
        given = {"namespace": "car", "engine": "fake", "scenes": "3", "real_time": "true", "out": "scores"}
        actions = launch.run(runpy.run_path(str(file))["generate_launch_description"](), given)
        with pytest.raises(ValueError, match="'real_time' must be true or false, found 'yes'"):
            launch.run(runpy.run_path(str(file))["generate_launch_description"](), {"real_time": "yes"})
    finally:
        for module in [name for name in sys.modules if name.split(".")[0] in ("launch", "launch_ros")]:
            del sys.modules[module]
    handler, world, node = actions
    assert handler.event_handler.target_action is world
    assert handler.event_handler.on_exit[0].event.reason == "the world has ended"
    assert Path(world.additional_env["FASTRTPS_DEFAULT_PROFILES_FILE"]).is_file()
    options = world_node.options_of(world.cmd[1 : world.cmd.index("--ros-args")])
    assert (options.driver, options.out, options.indices) == ("/car/flashdrive_node", Path("scores"), (0, 1, 2))
    assert options.mode.real_time
    assert node.parameters[1]["use_sim_time"] is True
    assert node.parameters[1]["auto_activate"] is True
    assert node.namespace == "car"
