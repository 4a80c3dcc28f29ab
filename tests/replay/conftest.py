"""One short drawn drive for all tests of recordings and replays."""

from pathlib import Path

import pytest

from flashdrive_node.evaluation.sample_bag import make_synthetic_bag
from flashdrive_node.runtime.rig import Rig, load_rig

SECONDS = 4.0


@pytest.fixture(scope="session")
def rig() -> Rig:
    return load_rig("sample")


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory, rig: Rig) -> Path:
    path = tmp_path_factory.mktemp("drive") / "drive"
    make_synthetic_bag(path, rig, seconds=SECONDS, width=192, height=108)
    return path
