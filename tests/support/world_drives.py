"""A driving node in its own process and the world's side of ROS in the test's, so that a test sees every state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rclpy.node import Node

from flashdrive_node.evaluation.closed_loop import ClosedLoop
from flashdrive_node.ros.closed_loop import reliable_inputs
from flashdrive_node.ros.scene_drive import DriveMode, SceneDrive
from flashdrive_node.ros.world_run import World, WorldOptions
from flashdrive_node.runtime.rig import load_rig, rig_remappings
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.scenario import sample_scenes
from support.node_process import Bench, NodeProcess

#: Scene of the test split: of the first hundred the one in which the expert is slowest when it hands over.
SLOW_SCENE = 3


def driving_node(bench: Bench, folder: Path, rig: Path | str, **parameters: object) -> NodeProcess:
    """The driving node as `flashdrive drive --ros` starts it, activated by itself."""
    known = load_rig(rig)
    own = {"rig": rig, "use_sim_time": True, "auto_activate": True, "diagnostics_period_s": 0.1}
    values = {**own, **reliable_inputs(known), **{k.replace("__", "."): v for k, v in parameters.items()}}
    return NodeProcess(bench, folder, values, rig_remappings(known))


@dataclass
class Driven:
    """One scene that is being driven."""

    drive: SceneDrive
    loop: ClosedLoop

    def steps(self, count: int) -> None:
        """Go on."""
        for _ in range(count):
            self.drive.step()

    @property
    def pose(self) -> tuple[float, float, float, float]:
        """x, y, yaw and speed now."""
        s = self.loop.state
        return float(s.x), float(s.y), float(s.yaw), float(s.speed)


@contextmanager
def world(bench: Bench, folder: Path, **options: Any) -> Iterator[World]:
    """The world's side, ready to drive."""
    node = Node("flashdrive_world", context=bench.context, start_parameter_services=False, enable_rosout=False)
    found = World(node, WorldOptions(out=folder / "out", **{"ready_timeout_s": 30.0, "silence_s": 5.0, **options}))
    try:
        found.wait_for_driver()
        yield found
    finally:
        found.close()
        node.destroy_node()


def begin(found: World, index: int) -> Driven:
    """Start a scene of the test split at the time of the first one of a run."""
    loop = ClosedLoop(sample_scenes(scene_keys("test", [index])), found.frames)
    drive = found.scene_drive(loop)
    drive.start()
    return Driven(drive, loop)


def real_time() -> DriveMode:
    """The world goes on with the wall clock."""
    return DriveMode(real_time=True)
