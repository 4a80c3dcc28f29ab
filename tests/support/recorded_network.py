"""The recorded small network in a node."""

from pathlib import Path
from typing import Any

#: Parameters of the node: greedy, because the network ends its own sentence; bounds that only what is broken exceeds.
RECORDED_NETWORK: dict[str, Any] = {
    "checkpoint": str(Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"),
    "device": "cpu",
    "precision": "float32",
    "top_k": 1,
    "max_generation_length": 16,
    "require_complete_reasoning": False,
    "max_result_age_s": 60.0,
    "max_acceleration": 20.0,
    "max_curvature": 2.0,
    "seed": 5,
}
