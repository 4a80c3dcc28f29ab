"""Let the driving node drive a vehicle of the procedural world, and score it.

ros2 launch flashdrive_node closed_loop.launch.py engine:=plain checkpoint:=/models/small scenes:=5 out:=scores

The world waits until the node is ready, drives its scenes one after the other and ends everything. In lock-step it
waits for every answer; with real_time:=true it goes on with the wall clock, and the node's latency is driven.
"""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from flashdrive_node.runtime.rig import share_directory

ARGUMENTS = (
    ("out", "out/closed_loop", "folder for the scores"),
    ("split", "test", "scenes: train, validation or test"),
    ("first", "0", "index of the first scene"),
    ("scenes", "1", "how many scenes"),
    ("seconds", "20.0", "length of a drive"),
    ("real_time", "false", "go on with the wall clock instead of waiting for every answer"),
    ("pictures", "jpeg", "compression of the pictures: jpeg or png"),
    ("device", "cpu", "torch device of the world"),
    ("namespace", "", "namespace of the node and its topics"),
    ("params_file", "", "parameters of the node (YAML); empty: the defaults of params/flashdrive.yaml"),
    ("rig", "sample", "camera rig, with cameras that the world has"),
    ("engine", "", "plain, streaming or fake; empty: as in params_file"),
    ("checkpoint", "", "directory of a checkpoint, or a Hugging Face id; empty: as in params_file"),
    ("output_frame", "", "base, odom or map; empty: as in params_file"),
    ("rviz", "false", "show cameras, path, samples and markers in RViz"),
    ("log_level", "info", "log level of the node"),
)

#: Arguments of flashdrive.launch.py that are handed on, and those that are options of the world.
HANDED_ON = ("namespace", "params_file", "rig", "engine", "checkpoint", "output_frame", "rviz", "log_level")
WORLD = ("out", "split", "first", "scenes", "seconds", "pictures", "device", "rig")


def generate_launch_description():
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text) for name, default, text in ARGUMENTS
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=_actions)])


def _actions(context):
    given = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    share = share_directory()
    world = Node(
        package="flashdrive_node",
        executable="flashdrive_world",
        arguments=_world_arguments(given),
        # Four images in one burst overflow Fast DDS's default shared memory on the publisher's side.
        additional_env={"FASTRTPS_DEFAULT_PROFILES_FILE": str(share / "params" / "fastdds_shared_memory.xml")},
        output="screen",
        emulate_tty=True,
    )
    handed_on = {name: given[name] for name in HANDED_ON} | {"use_sim_time": "true", "auto_activate": "true"}
    return [
        RegisterEventHandler(
            OnProcessExit(target_action=world, on_exit=[EmitEvent(event=Shutdown(reason="the world has ended"))])
        ),
        world,
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(share / "launch" / "flashdrive.launch.py")),
            launch_arguments=list(handed_on.items()),
        ),
    ]


def _world_arguments(given):
    namespace = given["namespace"].strip("/")
    arguments = ["--driver", f"/{namespace}/flashdrive_node" if namespace else "/flashdrive_node"]
    for name in WORLD:
        arguments += [f"--{name}", given[name]]
    real_time = given["real_time"].lower()
    if real_time not in ("true", "false"):
        raise ValueError(f"launch argument 'real_time' must be true or false, found {given['real_time']!r}")
    return [*arguments, *(["--real-time"] if real_time == "true" else [])]
