"""The kernels of compiled rendering find the same hits and shadows as the loops that they replace."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

# Kernels are interpreted on the CPU where that is chosen before they are imported.
PROGRAM = """
import torch
from flashdrive_node.world import raycast
from flashdrive_node.world.camera import CAMERAS, camera_rays
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.solids import build_solids
from flashdrive_node.world.state import first_state

scene = sample_scenes(scene_keys("train", range(4)))
state = first_state(scene)
sun = torch.nn.functional.normalize(torch.rand(4, 3) + 0.1, dim=1)
for camera in (CAMERAS[0], CAMERAS[3]):
    rays, solids = camera_rays(camera, 64, 32), build_solids(scene, state)
    looped = raycast.cast(solids, rays)
    down = (-rays.direction[None, ..., 2]).clamp(min=1e-2)
    far = (rays.origin[2] / down).expand_as(looped.distance)
    x, y = (rays.origin[i] + far * rays.direction[None, ..., i] for i in (0, 1))
    shaded = raycast.shade_on_ground(solids, rays, x, y, sun)
    assert 0.05 < (looped.distance < raycast.FAR_M).double().mean() < 0.95
    assert shaded[0].min() < 0.5 < shaded[0].mean()
    real, raycast._in_kernels = raycast._in_kernels, lambda solids: True
    hit = raycast.cast(solids, rays)
    torch.testing.assert_close(hit.distance, looped.distance, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hit.solid, looped.solid)
    torch.testing.assert_close(raycast.shade_on_ground(solids, rays, x, y, sun), shaded, rtol=0, atol=1e-4)
    raycast._in_kernels = real
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: nothing to compare")
def test_kernels_equal_the_loops() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr
