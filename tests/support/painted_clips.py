"""Windows with pictures of nothing, and a tiny model that answers them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.evaluation.clip import Clip, Window
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.int4 import quantise as round_to_nearest
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.model.paro_layouts import GROUP_SIZE, ROUNDS
from flashdrive_node.model.paroquant import ParoWeight
from flashdrive_node.training.architecture import alpamayo_small
from flashdrive_node.training.layer_inputs import InputSettings, collect_inputs
from flashdrive_node.training.text_windows import TextWindow
from flashdrive_node.training.vocabulary import build_tokenizer
from support.small_models import random_model
from support.tiny_dimensions import TINY

#: o_proj has 64 columns, which make no group.
DIMS = TINY | {"layers": 1, "text_hidden": 128, "text_mlp": 128, "text_heads": 4, "kv_heads": 2}


class PaintedClips:
    """Two clips of two windows with pictures of nothing."""

    name = "painted"
    camera_indices = (0, 1, 2, 6)

    def __len__(self) -> int:
        return 2

    def clips(self) -> Iterator[Clip]:
        for clip in range(2):
            yield Clip(str(clip), (Window(painted_observation(2 * clip + i), None) for i in range(2)))


def painted_observation(number: int) -> Observation:
    rng = np.random.default_rng(number)
    stamps = (0, 1, 2, 3)
    cameras = tuple(
        CameraFrames(index, stamps, tuple(rng.integers(0, 255, (4, 160, 288, 3), dtype=np.uint8)))
        for index in PaintedClips.camera_indices
    )
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = 0.5 * np.arange(-15, 1)
    return Observation(number, 0, cameras, xyz, np.tile(np.eye(3, dtype=np.float32), (16, 1, 1)), None)


def painted_model(folder: Path, **dimensions: int) -> LoadedModel:
    """A random model in a checkpoint of its own."""
    config = alpamayo_small(build_tokenizer(folder / "tokenizer"), **(DIMS | dimensions))
    model = random_model(config, seed=4)
    directory = save_checkpoint(model, config, folder / "checkpoint", tokenizer_files_dir=folder / "tokenizer")
    return load_alpamayo(directory, dtype=torch.float32)


def painted_windows(loaded: LoadedModel) -> list[TextWindow]:
    """What the model read and wrote on three of the windows."""
    met = collect_inputs(loaded, PaintedClips(), [], InputSettings(windows=4, stride=1, rows=64), with_windows=True)
    assert (len(met.windows), len(met.held_out_windows)) == (3, 1)
    return met.windows


def to_the_nearest(loaded: LoadedModel) -> dict[str, ParoWeight]:
    """All text layers that groups fit, without rotations."""
    layers = {}
    pairs = torch.arange(GROUP_SIZE, dtype=torch.int16).repeat(ROUNDS, 1)
    for name, module in loaded.model.named_modules():
        if name.startswith("language.layers") and isinstance(module, torch.nn.Linear) and module.in_features == 128:
            matrix = round_to_nearest(module.weight, GROUP_SIZE)
            layers[name] = ParoWeight(pairs, torch.zeros(ROUNDS, 64).half(), torch.ones(128).half(), matrix)
    return layers
