"""Scenes and drives that several tests look at."""

from __future__ import annotations

import numpy as np
import pytest

from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import Episode, record
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import Scenario

#: Of the recorded drives: history, 6.4 s of future, and some windows between.
STEPS = 140


@pytest.fixture(scope="session")
def episode() -> Episode:
    """Ten scenes of every scenario, driven by the expert."""
    keys = scene_keys("validation", np.arange(10 * len(Scenario)))
    return record(sample_scenes(keys), STEPS)
