"""Play a rosbag2 recording through the node, with RViz and a recording of the outputs where they are wanted.

ros2 launch flashdrive_node replay.launch.py bag:=drive.mcap rig:=sample engine:=fake rviz:=true record:=out

The recording starts when the node says that its engine is ready. Everything ends with the recording.
"""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit, OnProcessIO
from launch.events import Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

from flashdrive_node.runtime.rig import share_directory

ARGUMENTS = (
    ("bag", None, "rosbag2 recording: a directory, or an .mcap or .db3 file"),
    ("rate", "1.0", "speed of the replay"),
    ("loop", "false", "start again at the end"),
    ("start_offset", "0.0", "seconds of the recording to leave out"),
    ("record", "", "directory of a new recording of the node's outputs; empty: none"),
    ("namespace", "", "namespace of the node and its topics"),
    ("params_file", "", "parameters of the node (YAML); empty: the defaults of params/flashdrive.yaml"),
    ("rig", "sample", "camera rig that fits the recording"),
    ("engine", "", "plain, streaming or fake; empty: as in params_file"),
    ("checkpoint", "", "directory of a checkpoint, or a Hugging Face id; empty: as in params_file"),
    ("output_frame", "", "base, odom or map; empty: as in params_file"),
    ("rviz", "false", "show cameras, path, samples and markers in RViz"),
    ("log_level", "info", "log level of the node"),
)

#: Arguments of flashdrive.launch.py that are handed on.
HANDED_ON = ("namespace", "params_file", "rig", "engine", "checkpoint", "output_frame", "rviz", "log_level")

#: What the node logs when windows can be computed.
READY = b"engine ready"


def generate_launch_description():
    arguments = [
        DeclareLaunchArgument(name, description=text)
        if default is None
        else DeclareLaunchArgument(name, default_value=default, description=text)
        for name, default, text in ARGUMENTS
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=_actions)])


def _actions(context):
    given = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    share = share_directory()
    player = ExecuteProcess(
        cmd=[
            *("ros2", "bag", "play", given["bag"], "--clock", "100", "--rate", given["rate"]),
            *("--start-offset", given["start_offset"]),
            *(["--loop"] if given["loop"].lower() == "true" else []),
        ],
        # Four images in one burst overflow Fast DDS's default shared memory on the publisher's side.
        additional_env={"FASTRTPS_DEFAULT_PROFILES_FILE": str(share / "params" / "fastdds_shared_memory.xml")},
        output="screen",
    )
    started = []

    def play_when_ready(event):
        if READY not in event.text or started:
            return None
        started.append(player)
        return [player]

    actions = [
        RegisterEventHandler(OnProcessIO(on_stdout=play_when_ready, on_stderr=play_when_ready)),
        RegisterEventHandler(
            OnProcessExit(target_action=player, on_exit=[EmitEvent(event=Shutdown(reason="the recording has ended"))])
        ),
    ]
    if given["record"]:
        actions.append(_recorder(given))
    handed_on = {name: given[name] for name in HANDED_ON} | {"use_sim_time": "true", "auto_activate": "true"}
    actions.append(
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(share / "launch" / "flashdrive.launch.py")),
            launch_arguments=list(handed_on.items()),
        )
    )
    return actions


def _recorder(given):
    namespace = given["namespace"].strip("/")
    node = f"/{namespace}/flashdrive_node" if namespace else "/flashdrive_node"
    pattern = f"{node}/(output|debug)/.*|/diagnostics"
    return ExecuteProcess(
        cmd=[
            *("ros2", "bag", "record", "--storage", "mcap", "--use-sim-time"),
            *("--output", given["record"], "--regex", pattern),
        ],
        output="screen",
    )
