"""Small architectures of random shape, and models of them with random weights."""

import copy
from typing import Any

import torch

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.config_parser import parse_config
from flashdrive_node.model.presets import alpamayo_1_5_10b, alpamayo_r1_10b

#: Ids of the small vocabulary: text below, then trajectory tokens, then the release's special tokens.
TEXT_VOCAB = 120


def small_config(r1: bool = False, **dims: Any) -> AlpamayoConfig:
    """The release's configuration with small dimensions.

    Args:
        r1: R1's layout instead of 1.5's.
        dims: Any of the names in `defaults` below.
    """
    defaults: dict[str, Any] = {
        "text_hidden": 32,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "text_inter": 48,
        "section": [4, 2, 2],
        "vision_hidden": 32,
        "vision_depth": 3,
        "vision_heads": 2,
        "vision_inter": 40,
        "deepstack": [0, 2],
        "table": 36,
        "expert_hidden": 24,
        "expert_heads": 2,
        "expert_inter": 40,
        "proj_hidden": 16,
        "proj_layers": 2,
        "fourier": 8,
        "waypoints": 64,
        "flow_steps": 10,
    }
    unknown = dims.keys() - defaults.keys()
    assert not unknown, unknown
    d = defaults | dims
    base = alpamayo_r1_10b() if r1 else alpamayo_1_5_10b()
    model, vlm = copy.deepcopy(base.raw), copy.deepcopy(base.raw_vlm)
    vlm["text_config"] |= {
        "hidden_size": d["text_hidden"],
        "num_hidden_layers": d["layers"],
        "num_attention_heads": d["heads"],
        "num_key_value_heads": d["kv_heads"],
        "head_dim": d["head_dim"],
        "intermediate_size": d["text_inter"],
        "vocab_size": TEXT_VOCAB,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    vlm["text_config"]["rope_scaling"] = {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": d["section"],
    }
    vlm["vision_config"] |= {
        "hidden_size": d["vision_hidden"],
        "depth": d["vision_depth"],
        "num_heads": d["vision_heads"],
        "intermediate_size": d["vision_inter"],
        "deepstack_visual_indexes": d["deepstack"],
        "num_position_embeddings": d["table"],
        "out_hidden_size": d["text_hidden"],
    }
    vlm |= {
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
    }
    model["expert_cfg"] |= {
        "hidden_size": d["expert_hidden"],
        "num_attention_heads": d["expert_heads"],
        "intermediate_size": d["expert_inter"],
        "head_dim": d["head_dim"],
    }
    model["action_in_proj_cfg"] |= {
        "hidden_size": d["proj_hidden"],
        "num_enc_layers": d["proj_layers"],
        "num_fourier_feats": d["fourier"],
    }
    model["action_space_cfg"]["n_waypoints"] = d["waypoints"]
    model["diffusion_cfg"]["num_inference_steps"] = d["flow_steps"]
    shift = TEXT_VOCAB - model["traj_token_start_idx"]
    model["traj_token_start_idx"] += shift
    model["traj_token_ids"] = {name: id_ + shift for name, id_ in model["traj_token_ids"].items()}
    model["vocab_size"] += shift
    return parse_config(model, vlm, "small")


def random_model(config: AlpamayoConfig, seed: int, dtype: torch.dtype = torch.float32) -> Alpamayo:
    """A model with weights of a size that makes every part matter: norms away from one, biases away from zero."""
    generator = torch.Generator().manual_seed(seed)
    model = Alpamayo.on_meta(config, dtype).to_empty(device="cpu")
    model.set_constants("release", "cpu")
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            random = random * parameter.shape[-1] ** -0.5
        elif name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")):
            random = 1 + 0.2 * random
        else:
            random = 0.1 * random
        parameter.data.copy_(random)
    return model
