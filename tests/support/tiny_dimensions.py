"""Dimensions of the small model for tests on the CPU."""

from typing import Any

TINY: dict[str, Any] = {
    "vision_layers": 1,
    "vision_hidden": 32,
    "vision_heads": 1,
    "vision_mlp": 32,
    "position_table": 16,
    "deepstack": [0],
    "layers": 2,
    "text_hidden": 32,
    "text_heads": 2,
    "text_mlp": 32,
    "kv_heads": 1,
    "head_dim": 16,
    "mrope_section": [4, 2, 2],
    "expert_hidden": 32,
    "expert_heads": 2,
    "expert_mlp": 32,
    "action_hidden": 16,
}
