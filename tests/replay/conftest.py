"""The beginning of the bundled drive, for all tests of recordings and replays."""

from pathlib import Path

import pytest
from rosbags.interfaces import ConnectionExtRosbag2
from rosbags.rosbag2 import StoragePlugin, Writer

from flashdrive_node.bundled import bundled_drive
from flashdrive_node.runtime.bag import messages, open_bag
from flashdrive_node.runtime.rig import Rig, load_rig

SECONDS = 4.0


@pytest.fixture(scope="session")
def rig() -> Rig:
    return load_rig("sample")


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drive") / "drive"
    with (
        open_bag(bundled_drive()) as reader,
        Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer,
    ):
        connections = {}
        for c in reader.connections:
            assert isinstance(c.ext, ConnectionExtRosbag2)
            qos = c.ext.offered_qos_profiles
            connections[c.topic] = writer.add_connection(
                c.topic, c.msgtype, typestore=reader.typestore, offered_qos_profiles=qos
            )
        # Pictures are recorded 20 ms after they were taken.
        stop_ns = reader.start_time + round((SECONDS + 0.03) * 1e9)
        for c, stamp, raw in messages(reader, reader.connections, stop_ns=stop_ns):
            writer.write(connections[c.topic], stamp, raw)
    return path
