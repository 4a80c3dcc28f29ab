"""A recording replayed through the real node gives what the engine gives when it is stepped in process."""

import json
from pathlib import Path

import numpy as np
import pytest

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.evaluation.replay_report import read_outputs
from flashdrive_node.ros.engines import choose_engine
from flashdrive_node.ros.messages import odometry_sample
from flashdrive_node.ros.parameters import parameters_from
from flashdrive_node.runtime.bag import COMPRESSED_IMAGE, ODOMETRY, messages, open_bag
from flashdrive_node.runtime.decode import decode_image
from flashdrive_node.runtime.ego_history import EgoHistory, EgoWindow
from flashdrive_node.runtime.observation import OdometrySample, RawImage
from flashdrive_node.runtime.rig import Rig
from support.commands import run
from support.recorded_network import RECORDED_NETWORK

pytestmark = [pytest.mark.ros, pytest.mark.timeout(240)]

COMMON = RECORDED_NETWORK | {"num_samples": 2}


def read_sensors(drive: Path, rig: Rig) -> tuple[dict[tuple[str, int], RawImage], list[OdometrySample]]:
    """Images by camera and stamp, and odometry in order of its stamps."""
    cameras = {camera.topic: camera.name for camera in rig.cameras}
    images, odometry = {}, []
    with open_bag(drive) as reader:
        for connection, _, raw in messages(reader, reader.connections):
            if connection.msgtype not in (COMPRESSED_IMAGE, ODOMETRY):
                continue
            message = reader.deserialize(raw, connection.msgtype)
            stamp_ns = message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec
            if connection.msgtype == ODOMETRY:
                odometry.append(odometry_sample(message))
            else:
                image = RawImage(stamp_ns, 0, "jpeg", 0, 0, 0, False, message.data)
                images[cameras[connection.topic], stamp_ns] = image
    return images, odometry


@pytest.mark.parametrize(
    "own",
    [
        {"engine": "plain", "flow_steps": 4},
        {"engine": "streaming", "stream_mode": "kv", "flow_schedule": "8:0,1,2,7"},
    ],
    ids=["plain", "streaming"],
)
def test_replay_equals_stepping_in_process(tmp_path, drive, rig, one_thread, own):
    values = COMMON | own
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    said = run(
        tmp_path,
        "flashdrive_node.cli.main",
        *("replay", drive, "--quiet", "--duration", 2.6, "--rate", 0.3, "--record", tmp_path / "out", *settings),
        timeout_s=150.0,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    records = sorted(read_outputs(tmp_path / "out").records, key=lambda record: record["window_id"])
    assert len(records) >= 3

    images, odometry = read_sensors(drive, rig)
    engine = choose_engine(parameters_from(values), rig).make()
    engine.load()
    engine.warm_up()
    engine.reset("activated")
    history, taken = EgoHistory(base_frame=rig.base_frame), 0
    for record in records:
        while taken < len(odometry) and odometry[taken].stamp_ns <= record["t0_ns"] + 50_000_000:
            history.insert(odometry[taken])
            taken += 1
        ego = history.history_at(record["t0_ns"])
        assert isinstance(ego, EgoWindow), ego
        cameras = []
        for camera in rig.cameras:
            stamps = tuple(record["frame_stamps_ns"][camera.name])
            pictures = tuple(decode_image(images[camera.name, stamp]) for stamp in stamps)
            cameras.append(CameraFrames(camera.index, stamps, pictures))
        window = (record["window_id"], record["t0_ns"], tuple(cameras), ego.xyz, ego.rot, record["nav_text"])
        prediction = engine.step(Observation(*window))
        assert prediction.chosen == record["chosen"]
        assert [s.reasoning for s in prediction.samples] == [s["reasoning"] for s in record["samples"]]
        # The record is rounded to a tenth of a millimetre.
        np.testing.assert_allclose(prediction.trajectory.xyz, record["trajectory"]["xyz_m"], atol=1e-3)
        np.testing.assert_allclose(prediction.trajectory.speed, record["trajectory"]["speed_m_s"], atol=1e-3)
    engine.close()
