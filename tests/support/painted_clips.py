"""Windows with pictures of nothing, and a tiny model that answers them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.evaluation.clip import Clip, Window
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.training.architecture import alpamayo_small
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
