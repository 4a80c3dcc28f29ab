"""The world's cameras on the topics of a rig, as camera drivers describe them."""

from __future__ import annotations

from flashdrive_node.runtime.camera_model import CameraModel, level_camera
from flashdrive_node.runtime.rig import Rig, RigError
from flashdrive_node.world.camera import CAMERAS, Camera


def world_cameras(rig: Rig) -> dict[int, Camera]:
    """The world's camera for each camera of a rig, by index.

    Raises:
        RigError: The rig has a camera that the world has not.
    """
    known = {camera.index: camera for camera in CAMERAS}
    problems = [
        f"camera {spec.name!r} has index {spec.index}, the world has cameras {sorted(known)}"
        for spec in rig.cameras
        if spec.index not in known
    ]
    if problems:
        raise RigError(rig.name, problems)
    return {spec.index: known[spec.index] for spec in rig.cameras}


def camera_model(camera: Camera, width: int, height: int) -> CameraModel:
    """Calibration of a camera of the world whose pictures have this size."""
    ftheta = camera.projection == "ftheta"
    return level_camera((width, height), camera.field_of_view_deg, ftheta, camera.position, camera.yaw_deg)
