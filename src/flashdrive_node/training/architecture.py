"""The small Alpamayo: the release's architecture, configuration keys and prompt, a thousandth of its size.

Sized for a checkpoint of 20 MiB in bfloat16 and for pictures of 288 x 160, which make 9 x 5 tokens each.
"""

from __future__ import annotations

import copy
from typing import Any

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.config_parser import parse_config
from flashdrive_node.model.presets import alpamayo_1_5_10b
from flashdrive_node.training.vocabulary import VocabularyLayout

#: Width and height of the pictures that it sees.
IMAGE_SIZE = (288, 160)

#: What actions are normalised by: about the spread of the expert's acceleration (m/s^2) over 6.4 s behind windows that
#: are trained on, and of its curvature (1/m) there outside turns.
_ACTION_STATISTICS = {"accel_mean": 0.0, "accel_std": 1.1, "curvature_mean": 0.0, "curvature_std": 0.025}


def alpamayo_small(vocabulary: VocabularyLayout, **dims: Any) -> AlpamayoConfig:
    """The configuration.

    Args:
        vocabulary: Of `build_tokenizer`.
        dims: Dimensions to change, by the names in `small_dimensions`, for tests.

    Raises:
        ConfigError: Dimensions that do not fit together.
        ValueError: A dimension that there is not.
    """
    d = small_dimensions()
    if unknown := dims.keys() - d.keys():
        raise ValueError(f"dims: {', '.join(d)} are known, found {', '.join(sorted(unknown))}")
    d |= dims
    base = alpamayo_1_5_10b()
    model, vlm = copy.deepcopy(base.raw), copy.deepcopy(base.raw_vlm)
    vlm["text_config"] |= {
        "hidden_size": d["text_hidden"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["text_heads"],
        "num_key_value_heads": d["kv_heads"],
        "head_dim": d["head_dim"],
        "intermediate_size": d["text_mlp"],
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": d["mrope_section"], "rope_type": "default"},
        **vocabulary.text_entries(),
    }
    vlm["vision_config"] |= {
        "deepstack_visual_indexes": d["deepstack"],
        "depth": d["vision_layers"],
        "hidden_size": d["vision_hidden"],
        "intermediate_size": d["vision_mlp"],
        "num_heads": d["vision_heads"],
        "num_position_embeddings": d["position_table"],
        "out_hidden_size": d["text_hidden"],
    }
    vlm |= vocabulary.backbone_entries()
    model["expert_cfg"] |= {
        "head_dim": d["head_dim"],
        "hidden_size": d["expert_hidden"],
        "intermediate_size": d["expert_mlp"],
        "num_attention_heads": d["expert_heads"],
    }
    model["action_in_proj_cfg"] |= {"hidden_size": d["action_hidden"], "max_freq": 20.0}
    model["action_space_cfg"] |= _ACTION_STATISTICS
    # The future has no discrete tokens here, so the history's bins are all that there are.
    del model["traj_tokenizer_cfg"]
    width, height = IMAGE_SIZE
    # A little above the size itself, so that 1920 x 1080 becomes it too, and not something narrower.
    model |= {"min_pixels": width * height, "max_pixels": 46 * 1024, **vocabulary.config_entries()}
    return parse_config(model, vlm, "small Alpamayo")


def small_dimensions() -> dict[str, Any]:
    """What `alpamayo_small` is made of."""
    return {
        "vision_layers": 6,
        "vision_hidden": 192,
        "vision_heads": 3,
        "vision_mlp": 512,
        "position_table": 16 * 16,
        "deepstack": [2],
        "layers": 6,
        "text_hidden": 256,
        "text_heads": 4,
        "text_mlp": 512,
        "kv_heads": 2,
        "head_dim": 64,
        "mrope_section": [12, 10, 10],
        "expert_hidden": 256,
        "expert_heads": 4,
        "expert_mlp": 256,
        "action_hidden": 96,
    }
