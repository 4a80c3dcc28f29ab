"""Start the driving node with the topics of a camera rig, and RViz where it is wanted.

ros2 launch flashdrive_node flashdrive.launch.py rig:=autoware checkpoint:=/models/Alpamayo-1.5-10B
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from flashdrive_node.runtime.rig import load_rig, rig_remappings, share_directory

NODE = "flashdrive_node"

#: Launch argument, default, description. An empty default leaves the value to params_file.
ARGUMENTS = (
    ("namespace", "", "namespace of the node and its topics"),
    ("params_file", "", "parameters of the node (YAML); empty: the defaults of params/flashdrive.yaml"),
    ("rig", "sample", "camera rig: a name in params/rigs, or a path to a YAML file"),
    ("engine", "", "plain, streaming or fake; empty: as in params_file"),
    ("checkpoint", "", "directory of a checkpoint, or a Hugging Face id; empty: as in params_file"),
    ("output_frame", "", "base, odom or map; empty: as in params_file"),
    ("auto_activate", "true", "configure and activate at start"),
    ("use_sim_time", "false", "take the time from /clock"),
    ("rviz", "false", "show cameras, path, samples and markers in RViz"),
    ("log_level", "info", "log level of the node"),
    ("respawn", "false", "start the node again two seconds after it ended"),
)

#: Topics of the RViz config beside those of the cameras, under the node's name.
SHOWN = ("output/path", "output/trajectory_samples", "debug/markers")


def generate_launch_description():
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text) for name, default, text in ARGUMENTS
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=_actions)])


def _actions(context):
    given = {name: LaunchConfiguration(name).perform(context) for name, _, _ in ARGUMENTS}
    rig = load_rig(given["rig"])
    remappings = rig_remappings(rig)
    params_file = given["params_file"] or str(share_directory() / "params" / "flashdrive.yaml")
    # Declared as text: launch would read a checkpoint called "12" as a number.
    texts = {name: given[name] for name in ("rig", "engine", "checkpoint", "output_frame") if given[name]}
    overrides = {name: ParameterValue(value, value_type=str) for name, value in texts.items()}
    overrides |= {name: _flag(given, name) for name in ("auto_activate", "use_sim_time")}
    node = Node(
        package="flashdrive_node",
        executable="flashdrive_node",
        name=NODE,
        namespace=given["namespace"],
        parameters=[params_file, overrides],
        remappings=remappings,
        ros_arguments=["--log-level", given["log_level"]],
        respawn=_flag(given, "respawn"),
        respawn_delay=2.0,
        output="screen",
        emulate_tty=True,
    )
    return [node, _rviz(given, rig, remappings)] if _flag(given, "rviz") else [node]


def _rviz(given, rig, remappings):
    """RViz with the config's topics (those of a node without namespace) led to this node's and the rig's."""
    namespace = given["namespace"].strip("/")
    full_name = f"/{namespace}/{NODE}" if namespace else f"/{NODE}"
    led = [(topic.replace("~", f"/{NODE}", 1), target) for topic, target in remappings]
    led += [(f"/{NODE}/{topic}", f"{full_name}/{topic}") for topic in SHOWN] if namespace else []
    return Node(
        package="rviz2",
        executable="rviz2",
        namespace=given["namespace"],
        arguments=["-d", str(share_directory() / "params" / "flashdrive.rviz"), "-f", rig.base_frame],
        parameters=[{"use_sim_time": _flag(given, "use_sim_time")}],
        remappings=led,
    )


def _flag(given, name):
    value = given[name].lower()
    if value not in ("true", "false"):
        raise ValueError(f"launch argument '{name}' must be true or false, found {given[name]!r}")
    return value == "true"
