"""A ROS domain of the run's own, on the loopback only."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.node_process import Bench, own_domain_id


@pytest.fixture(scope="session", autouse=True)
def _ros_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Discovery limited to this machine, and logs that do not land in the home directory."""
    wanted = {
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_DOMAIN_ID": str(own_domain_id()),
        "ROS_LOG_DIR": str(tmp_path_factory.mktemp("ros_log")),
    }
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    yield
    for key, value in before.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@pytest.fixture(scope="module")
def bench(_ros_environment: None) -> Iterator[Bench]:
    """The test's own participant in the domain."""
    participant = Bench(own_domain_id())
    yield participant
    participant.close()
