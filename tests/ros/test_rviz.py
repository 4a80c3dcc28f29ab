"""The RViz view: display classes that exist, and topics that the node has."""

from __future__ import annotations

import pytest
import yaml
from std_msgs.msg import Header

from flashdrive_node.ros import topics
from flashdrive_node.ros.markers import markers
from flashdrive_node.ros.messages import OutputFrame, duration_message
from flashdrive_node.runtime.rig import load_rig, rig_remappings, share_directory
from support.windows import arc, prediction

CONFIG = yaml.safe_load((share_directory() / "params" / "flashdrive.rviz").read_text())
DISPLAYS = CONFIG["Visualization Manager"]["Displays"]
#: Display classes of rviz_default_plugins, and what a display of theirs cannot do without.
CLASSES = {
    "Grid": {"Reference Frame", "Cell Size", "Plane"},
    "Image": {"Topic"},
    "MarkerArray": {"Topic", "Namespaces"},
    "Odometry": {"Topic", "Keep", "Shape"},
    "Path": {"Topic", "Line Style", "Buffer Length"},
    "PoseArray": {"Topic", "Shape"},
}
POLICIES = {"Depth", "Durability Policy", "History Policy", "Reliability Policy", "Value"}


@pytest.mark.parametrize("display", DISPLAYS, ids=lambda d: d["Name"])
def test_displays_are_of_rviz(display):
    package, _, name = display["Class"].partition("/")
    assert package == "rviz_default_plugins"
    assert CLASSES[name] <= set(display)
    assert display["Value"] == display["Enabled"]
    if "Topic" in display:
        assert set(display["Topic"]) >= POLICIES
        sensor = "/input/" in display["Topic"]["Value"]
        assert display["Topic"]["Reliability Policy"] == ("Best Effort" if sensor else "Reliable")


def test_topics_are_those_of_the_node():
    shown = {display["Topic"]["Value"] for display in DISPLAYS if "Topic" in display}
    outputs = (topics.PATH, topics.TRAJECTORY_SAMPLES, topics.MARKERS)
    inputs = [topic for topic, _ in rig_remappings(load_rig("sample")) if "camera_info" not in topic]
    offered = {topic.replace("~", f"/{topics.NODE_NAME}") for topic in (*outputs, *inputs)}
    assert shown == offered - {f"/{topics.NODE_NAME}/input/navigation"}


def test_every_marker_namespace_is_switched_on():
    (display,) = [d for d in DISPLAYS if d["Class"].endswith("MarkerArray")]
    result = prediction(arc(5.0, 0.0), arc(6.0, 0.0))
    drawn = markers(Header(), result, OutputFrame("base_link"), load_rig("sample"), 2.0, duration_message(1.0))
    assert display["Namespaces"] == {marker.ns: True for marker in drawn.markers}


def test_names_are_unique_and_the_fixed_frame_is_the_vehicle():
    names = [display["Name"] for display in DISPLAYS]
    assert len(names) == len(set(names))
    assert CONFIG["Visualization Manager"]["Global Options"]["Fixed Frame"] == load_rig("sample").base_frame
