"""The published architectures, written down so that benchmarks and tests need no download.

Values of ``config.json`` of nvidia/Alpamayo-1.5-10B and nvidia/Alpamayo-R1-10B, and of the Qwen3-VL-8B layout of their
backbone. A checkpoint is always read by its own files; nothing here is a fallback for them.
"""

from __future__ import annotations

import math
from typing import Any

from flashdrive_node.model.config import ALPAMAYO_1_5, ALPAMAYO_R1, AlpamayoConfig
from flashdrive_node.model.config_parser import parse_config
from flashdrive_node.model.state_dict import release_slots

#: Tokens of the prompt that are neither image tokens nor ego history: 4 cameras x 4 frames, released vocabulary,
#: no navigation text (3086 and 3006 tokens in all, 16 x 180 of them image tokens and 48 history).
PROMPT_TEXT_TOKENS = {ALPAMAYO_1_5: 158, ALPAMAYO_R1: 78}


def qwen3_vl_8b() -> dict[str, Any]:
    """``config.json`` of the backbone."""
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 12288,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": [8, 16, 24],
            "depth": 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4304,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


def _action_space(package: str) -> dict[str, Any]:
    return {
        "_target_": f"{package}.action_space.UnicycleAccelCurvatureActionSpace",
        "a_lambda": 0.0001,
        "a_ridge": 0.0001,
        "accel_bounds": [-9.8, 9.8],
        "accel_mean": 0.02902694707164455,
        "accel_std": 0.6810426736454882,
        "curvature_bounds": [-0.33, 0.33],
        "curvature_mean": 0.0002692167976330542,
        "curvature_std": 0.026148280660833106,
        "dt": 0.1,
        "kappa_lambda": 0.0001,
        "kappa_ridge": 0.0001,
        "n_waypoints": 64,
        "theta_lambda": 1e-06,
        "theta_ridge": 1e-08,
        "v_lambda": 1e-06,
        "v_ridge": 0.0001,
    }


def _release(model_type: str, architecture: str, package: str, with_labels: bool) -> dict[str, Any]:
    """``config.json`` of a release; `with_labels` puts camera names and frame numbers into the prompt."""
    return {
        "action_in_proj_cfg": {
            "_target_": f"{package}.models.action_in_proj.PerWaypointActionInProjV2",
            "hidden_size": 512,
            "max_freq": 100.0,
            "num_enc_layers": 2,
            "num_fourier_feats": 20,
        },
        "action_out_proj_cfg": {"_target_": "torch.nn.Linear"},
        "action_space_cfg": _action_space(package),
        "add_special_tokens": True,
        "architectures": [architecture],
        "attn_implementation": "flash_attention_2",
        "diffusion_cfg": {
            "_target_": f"{package}.diffusion.flow_matching.FlowMatching",
            "int_method": "euler",
            "x_dims": "???",
        },
        "dtype": "bfloat16",
        "expert_cfg": {
            "dtype": "bfloat16",
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 8256,
            "num_attention_heads": 16,
        },
        "expert_non_causal_attention": True,
        "hist_traj_tokenizer_cfg": {"_target_": f"{package}.models.delta_tokenizer.DeltaTrajectoryTokenizer"},
        "include_camera_ids": with_labels,
        "include_frame_nums": with_labels,
        "keep_same_dtype": True,
        "max_pixels": 196608,
        "min_pixels": 163840,
        "model_dtype": "bfloat16",
        "model_type": model_type,
        "padding_side": "left",
        "tokens_per_future_traj": 128,
        "tokens_per_history_traj": 48,
        "traj_token_ids": {
            "future": 155685,
            "future_end": 155683,
            "future_start": 155681,
            "history": 155684,
            "history_end": 155676,
            "history_start": 155674,
        },
        "traj_token_start_idx": 151669,
        "traj_tokenizer_cfg": {
            "_recursive_": False,
            "_target_": f"{package}.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
            "action_space_cfg": _action_space(package),
            "dims_max": [10, 10],
            "dims_min": [-10, -10],
            "num_bins": 3000,
        },
        "traj_vocab_size": 4000,
        "vlm_backend": "qwenvl3",
        "vlm_name_or_path": "nvidia/Cosmos-Reason2-8B",
        "vocab_size": 155697,
    }


def alpamayo_1_5_10b() -> AlpamayoConfig:
    """Architecture of nvidia/Alpamayo-1.5-10B."""
    model = _release(ALPAMAYO_1_5, "Alpamayo1_5", "alpamayo1_5", with_labels=True)
    return parse_config(model, qwen3_vl_8b(), "preset Alpamayo-1.5-10B")


def alpamayo_r1_10b() -> AlpamayoConfig:
    """Architecture of nvidia/Alpamayo-R1-10B."""
    model = _release(ALPAMAYO_R1, "AlpamayoR1", "alpamayo_r1", with_labels=False)
    return parse_config(model, qwen3_vl_8b(), "preset Alpamayo-R1-10B")


def parameter_count(config: AlpamayoConfig) -> int:
    """Parameters of a checkpoint of this architecture (11,078,526,194 for the published ones)."""
    return sum(math.prod(slot.shape) for slot in release_slots(config) if not slot.optional)
