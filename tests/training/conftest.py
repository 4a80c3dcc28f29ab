"""A tiny model of the small model's kind, and windows of a few short drives."""

from pathlib import Path

import pytest
import torch

from flashdrive_node.engine.batched_policy import RELEASE_CAMERAS
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.prompt_batch import PromptLayout
from flashdrive_node.model.tokenizer import AlpamayoTokenizer, load_tokenizer
from flashdrive_node.training.architecture import alpamayo_small
from flashdrive_node.training.drives import DriveJob, windows_of
from flashdrive_node.training.initial_weights import new_model
from flashdrive_node.training.pictures import Pictures
from flashdrive_node.training.replay_buffer import Scribe
from flashdrive_node.training.vocabulary import build_tokenizer
from flashdrive_node.training.windows import Windows
from support.tiny_dimensions import TINY

JOB = DriveJob("train", 0, 24, 40, seed=3, steps=90)


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def windows() -> Windows:
    return windows_of(JOB)


@pytest.fixture
def model(tokenizer_files) -> Alpamayo:
    config = alpamayo_small(build_tokenizer(tokenizer_files), **TINY)
    return new_model(config, torch.device("cpu"), torch.float32, seed=0)


@pytest.fixture
def tokenizer(model, tokenizer_files) -> AlpamayoTokenizer:
    return load_tokenizer(tokenizer_files, model.config)


@pytest.fixture
def scribe(model, tokenizer) -> Scribe:
    return Scribe(PromptLayout(tokenizer, model.config, RELEASE_CAMERAS, 4, (10, 18)), model, tokenizer)


def noisy_pictures(count: int, seed: int = 0) -> Pictures:
    """Pictures of nothing, with labels of as little meaning."""
    generator = torch.Generator().manual_seed(seed)
    return Pictures(
        torch.randint(0, 256, (count, 4, 4, 160, 288, 3), dtype=torch.uint8, generator=generator),
        torch.randint(0, 1 << 14, (count, 720), dtype=torch.int16, generator=generator),
        torch.rand((count, 720), generator=generator).half() * 5 - 1,
    )
