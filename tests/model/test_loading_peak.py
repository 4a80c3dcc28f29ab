"""Loading never holds much more than what it keeps, for every layout and every preset, counted with real files.

The bound for the published model is 1 GiB. Here it is what makes that up: the buffers that files are read into, a few
copies of a piece that is being rounded, and the packed layers in flight, all of which are small beside the model.
"""

from pathlib import Path

import pytest
import torch

from flashdrive_node.model import checkpoint as loader
from flashdrive_node.model import loading
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.linear import QuantisedLinear
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.model.paroquant import ParoLinear
from flashdrive_node.model.precision import PRESETS, StagePrecision
from support.live_memory import LiveMemory
from support.published_packings import int16_tensors, marlin_tensors
from support.quantised import plain_model, quantised_checkpoint, republished
from support.tiny_dimensions import TINY

#: Wide enough that every matrix is larger than a piece.
DIMS = TINY | {"text_hidden": 256, "text_mlp": 512, "text_heads": 4, "kv_heads": 4, "expert_heads": 4}
PIECE = 4 << 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: plain, in float32, and in every layout of 4 bits."""
    folder = tmp_path_factory.mktemp("peak")
    model = plain_model(folder / "tokenizer", DIMS)
    save_checkpoint(model, model.config, folder / "plain", tokenizer_files_dir=folder / "tokenizer")
    save_checkpoint(model, model.config, folder / "float32", dtype=None, tokenizer_files_dir=folder / "tokenizer")
    quantised_checkpoint(model, folder / "tokenizer", folder / "generic")
    republished(folder / "generic", folder / "int16", int16_tensors)
    republished(folder / "generic", folder / "Marlin", marlin_tensors)
    return folder


@pytest.mark.parametrize(
    ("name", "precision", "cached"),
    [
        ("plain", PRESETS["bf16"], False),
        ("plain", PRESETS["fp8"], False),
        ("float32", PRESETS["fp8"], False),
        ("generic", PRESETS["w4a8"], False),
        ("int16", PRESETS["w4a16"], False),
        ("Marlin", PRESETS["w4a8"], False),
        ("Marlin", PRESETS["w4a8"], True),
    ],
    ids=lambda value: value.name if isinstance(value, StagePrecision) else str(value),
)
def test_peak(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: StagePrecision, cached: bool
) -> None:
    monkeypatch.setattr(loader, "PIECE_BYTES", PIECE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not cached:
        monkeypatch.setattr(loading, "unpacked_file", lambda *_: None)
    with LiveMemory() as memory:
        model = load_alpamayo(folder / name, precision=precision, hash_files=False).model
    kept = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
    buffers = (loader._BUFFERS + 1) * PIECE
    rounded = 12 * PIECE if any(isinstance(m, QuantisedLinear) for m in model.modules()) else 0
    # A layer is unpacked to a byte for each of its codes, a few copies of them, before the next one is complete; and
    # its rotation becomes a matrix of float32 for every group of 128.
    packed = [m for m in model.modules() if isinstance(m, ParoLinear)]
    codes = max((m.in_features * m.out_features for m in packed), default=0)
    rotation = max((4 * 128 * m.in_features for m in packed), default=0)
    assert memory.peak >= kept > 1 << 20
    assert memory.peak - kept <= buffers + rounded + 4 * (codes + rotation)
    assert memory.bytes <= kept + buffers + (64 << 10)


def test_plain_weights_that_are_rounded_are_never_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is by far the largest matrix: with it in 8 bits the peak stays below the model with it in 16."""
    monkeypatch.setattr(loader, "PIECE_BYTES", PIECE)
    with LiveMemory() as memory:
        model = load_alpamayo(folder / "plain", precision=StagePrecision(lm_head="int8"), hash_files=False).model
    kept = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
    head = model.config.tokens.vocab_size * model.config.text.hidden_size
    assert head > 20 * PIECE
    assert kept <= memory.peak < kept + head
    assert torch.isfinite(model.language.lm_head(torch.ones(1, 256, dtype=torch.bfloat16))).all()
