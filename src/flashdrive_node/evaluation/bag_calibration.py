"""Calibrations of a recording's cameras, from CameraInfo and the static transforms of the vehicle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flashdrive_node.runtime.bag import open_bag
from flashdrive_node.runtime.camera_model import DISTORTION_MODELS, CameraModel
from flashdrive_node.runtime.rig import Rig
from flashdrive_node.runtime.rotation import matrix_from_quaternion

_STATIC_TOPIC = "/tf_static"


def read_calibrations(bag: Path, rig: Rig) -> dict[str, CameraModel]:
    """Calibration by name of every camera that the recording describes in full, with a transform from the base frame.

    A camera whose distortion model is not known here, or that is not mounted on the base frame directly, is left out.

    Raises:
        BagError: The recording cannot be read.
    """
    topics = {c.camera_info_topic: c.name for c in rig.cameras if c.camera_info_topic is not None}
    infos: dict[str, Any] = {}
    mounts: dict[str, Any] = {}
    with open_bag(bag) as reader:
        for connection in reader.connections:
            if connection.topic not in topics and connection.topic != _STATIC_TOPIC:
                continue
            # The first message of each: calibrations do not change while a vehicle drives.
            for _, _, raw in reader.messages([connection]):
                message: Any = reader.deserialize(raw, connection.msgtype)
                if connection.topic in topics:
                    infos.setdefault(topics[connection.topic], message)
                    break
                mounts |= {t.child_frame_id: t for t in message.transforms if t.header.frame_id == rig.base_frame}
    models = {name: _model(info, mounts.get(info.header.frame_id)) for name, info in infos.items()}
    return {name: model for name, model in models.items() if model is not None}


def _model(info: Any, mount: Any) -> CameraModel | None:
    if mount is None or DISTORTION_MODELS.get(info.distortion_model) != len(info.d) or not info.k[0] > 0:
        return None
    t, q = mount.transform.translation, mount.transform.rotation
    return CameraModel(
        width=int(info.width),
        height=int(info.height),
        distortion_model=info.distortion_model,
        coefficients=tuple(float(v) for v in info.d),
        focal=(float(info.k[0]), float(info.k[4])),
        principal=(float(info.k[2]), float(info.k[5])),
        position=np.array([t.x, t.y, t.z]),
        rotation=matrix_from_quaternion(np.array([q.x, q.y, q.z, q.w])),
    )
