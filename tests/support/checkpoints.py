"""Checkpoints on disk for tests: the bundled one, random ones, and ways to damage them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint import CheckpointInfo, load_weights
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.source import read_config
from flashdrive_node.model.state_dict import release_slots

ORACLE = Path(__file__).parent.parent / "data" / "oracle_small"
BUNDLED = ORACLE / "checkpoint"
STUB = ORACLE / "vlm_stub"


def load(
    directory: Path, dtype: torch.dtype = torch.bfloat16, config: AlpamayoConfig | None = None, **options: Any
) -> tuple[Alpamayo, CheckpointInfo]:
    """A model on the CPU, loaded from `directory` under its own configuration or under `config`."""
    config = config or read_config(directory)
    model = Alpamayo.on_meta(config, dtype)
    model.set_constants("release", "cpu")
    info = load_weights(model, release_slots(config), directory, "cpu", **options)
    return model, info


def release_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors under the release's names, read by the safetensors library."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a file, leaving its data as it is."""
    header, data = header_of(path)
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
