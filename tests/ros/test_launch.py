"""Launch files, recorded by a stand-in for ``launch``; the command line that comes out is run for real."""

from __future__ import annotations

import ast
import itertools
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rcl_interfaces.srv import GetParameters

from flashdrive_node.runtime.rig import load_rig, rig_remappings, share_directory
from support.node_process import Bench, NodeProcess, wait_until

LAUNCH = share_directory() / "launch"
STAND_IN = Path(__file__).parents[1] / "support" / "recorded_launch"


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Runs a launch file; the actions by what they start."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(name: str, **arguments: str) -> list:
        import launch

        description = runpy.run_path(str(LAUNCH / name))["generate_launch_description"]()
        return launch.run(description, arguments)

    yield run
    for module in [name for name in sys.modules if name.split(".")[0] in ("launch", "launch_ros")]:
        del sys.modules[module]


def of(actions: list, executable: str):
    """The one action that starts this."""
    (found,) = [a for a in actions if getattr(a, "cmd", [""])[0] == executable]
    return found


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.launch.py")), ids=lambda p: p.name)
def test_launch_files_import_nothing_that_a_launch_process_lacks(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert {name.split(".")[0] for name in imported} <= {"launch", "launch_ros", "flashdrive_node"}
    assert {name for name in imported if name.startswith("flashdrive_node")} == {"flashdrive_node.runtime.rig"}


def test_the_rig_decides_the_remappings(launched):
    for rig in ("autoware", "physical_ai", "sample"):
        node = of(launched("flashdrive.launch.py", rig=rig), "flashdrive_node")
        assert node.remappings == rig_remappings(load_rig(rig))
        assert ("~/input/odometry", load_rig(rig).odometry_topic) in node.remappings


def test_empty_arguments_leave_the_values_to_the_params_file(launched, tmp_path):
    node = of(launched("flashdrive.launch.py", params_file=str(tmp_path / "mine.yaml")), "flashdrive_node")
    file, overrides = node.parameters
    assert file == str(tmp_path / "mine.yaml")
    assert set(overrides) == {"rig", "auto_activate", "use_sim_time"}
    assert overrides["auto_activate"] is True
    assert overrides["use_sim_time"] is False


def test_texts_stay_texts(launched):
    node = of(launched("flashdrive.launch.py", checkpoint="12", engine="plain"), "flashdrive_node")
    files = [part for before, part in itertools.pairwise(node.cmd) if before == "--params-file"]
    written = yaml.safe_load(Path(files[-1]).read_text())
    assert written["/**"]["ros__parameters"]["checkpoint"] == "12"


def test_wrong_flags_and_unknown_arguments_are_refused(launched):
    with pytest.raises(ValueError, match="'rviz' must be true or false, found 'yes'"):
        launched("flashdrive.launch.py", rviz="yes")
    with pytest.raises(KeyError, match="not declared"):
        launched("flashdrive.launch.py", rvis="true")
    with pytest.raises(KeyError, match="'bag' is required"):
        launched("replay.launch.py")


def test_respawn_and_log_level(launched):
    node = of(launched("flashdrive.launch.py", respawn="true", log_level="debug"), "flashdrive_node")
    assert node.respawn is True
    assert node.cmd[node.cmd.index("--log-level") + 1] == "debug"


def test_rviz_gets_the_topics_of_the_node_and_the_rig(launched):
    rviz = of(launched("flashdrive.launch.py", rviz="true", rig="autoware", namespace="car"), "rviz2")
    led = dict(rviz.remappings)
    config = yaml.safe_load((share_directory() / "params" / "flashdrive.rviz").read_text())
    for display in config["Visualization Manager"]["Displays"]:
        if "Topic" in display:
            assert display["Topic"]["Value"] in led
    assert led["/flashdrive_node/output/path"] == "/car/flashdrive_node/output/path"
    assert led["/flashdrive_node/input/front_wide/image/compressed"] == ("/sensing/camera/camera0/image_raw/compressed")
    assert rviz.cmd[rviz.cmd.index("-f") + 1] == "base_link"


def test_replay_plays_once_the_engine_is_ready_and_ends_with_the_recording(launched):
    arguments = {"bag": "drive.mcap", "rate": "2.0", "loop": "true", "start_offset": "1.5", "record": "out"}
    actions = launched("replay.launch.py", engine="fake", namespace="car", **arguments)
    node = of(actions, "flashdrive_node")
    assert node.parameters[1]["use_sim_time"] is True
    assert node.parameters[1]["engine"].value == "fake"
    handlers = [a.event_handler for a in actions if hasattr(a, "event_handler")]
    output, ended = handlers
    assert output.on_stdout(SimpleNamespace(text=b"[INFO] reset: activated")) is None
    (player,) = output.on_stderr(SimpleNamespace(text=b"[INFO] engine ready: fake"))
    assert output.on_stderr(SimpleNamespace(text=b"[INFO] engine ready: fake")) is None, "it starts once"
    assert player.cmd == (
        ["ros2", "bag", "play", "drive.mcap", "--clock", "100", "--rate", "2.0", "--start-offset", "1.5", "--loop"]
    )
    assert Path(player.additional_env["FASTRTPS_DEFAULT_PROFILES_FILE"]).is_file()
    assert ended.target_action is player
    assert ended.on_exit[0].event.reason
    recorder = of(actions, "ros2")
    assert recorder.cmd[recorder.cmd.index("--output") + 1] == "out"
    assert recorder.cmd[-1] == "/car/flashdrive_node/(output|debug)/.*|/diagnostics"


@pytest.mark.ros
def test_the_launched_command_line_starts_the_node(launched, bench: Bench, tmp_path):
    launched_node = of(launched("flashdrive.launch.py", engine="fake", namespace="car"), "flashdrive_node")
    node = NodeProcess(bench, tmp_path, {}, namespace="/car")
    node.command = [str(Path(sys.executable).with_name("flashdrive_node")), *launched_node.cmd[1:]]
    with node:
        wait_until(lambda: node.running() and node.state() == "active", 20.0, "the node", lambda: node.output)
        for camera in load_rig("sample").cameras:
            assert bench.node.count_subscribers(camera.topic) == 1, camera.topic
        request = GetParameters.Request(names=["engine", "rig", "auto_activate"])
        values = bench.call(GetParameters, f"{node.full_name}/get_parameters", request).values
        assert (values[0].string_value, values[1].string_value, values[2].bool_value) == ("fake", "sample", True)
        assert node.stop() == 0
