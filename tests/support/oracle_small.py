"""The committed recording of the reference: two cases on a small random checkpoint."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.config_parser import parse_config

ROOT = Path(__file__).parents[1] / "data" / "oracle_small"
TOKENIZER = ROOT / "vlm_stub"


def config() -> AlpamayoConfig:
    model = json.loads((ROOT / "checkpoint" / "config.json").read_text())
    vlm = json.loads((TOKENIZER / "config.json").read_text())
    return parse_config(model, vlm)


def case(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Recorded tensors and the description of one case."""
    path = ROOT / "cases" / name
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def inputs() -> dict[str, Tensor]:
    return load_file(ROOT / "inputs.safetensors")
