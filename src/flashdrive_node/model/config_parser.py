"""Reads an architecture from a checkpoint's ``config.json`` and its backbone's Qwen3-VL ``config.json``."""

from __future__ import annotations

from typing import Any

from flashdrive_node.model.config import (
    ALPAMAYO_1_5,
    ALPAMAYO_R1,
    ActionInProjConfig,
    ActionSpaceConfig,
    AlpamayoConfig,
    DecoderConfig,
    FlowMatchingConfig,
    HistoryTokenizerConfig,
    TokenConfig,
    VisionConfig,
)
from flashdrive_node.model.errors import ConfigError

_REQUIRED = object()


def parse_config(model: dict[str, Any], vlm: dict[str, Any], where: str = "config.json") -> AlpamayoConfig:
    """Parse the checkpoint's and the backbone's configuration.

    Args:
        model: The checkpoint's ``config.json``.
        vlm: The Qwen3-VL ``config.json`` that ``vlm_name_or_path`` points to.
        where: Name of the checkpoint for error messages.

    Raises:
        ConfigError: Lists every missing key, wrong type and contradiction.
    """
    return _Parser(where).parse(model, vlm)


class _Parser:
    """Collects every problem before it gives up."""

    def __init__(self, where: str):
        self.where = where
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def get(self, source: dict[str, Any], path: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Value at a dotted path, checked against ``kind``; a harmless stand-in where it is missing or wrong."""
        value: Any = source
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            if default is _REQUIRED:
                self.problem(f"key {path!r} is required ({kind.__name__}), found nothing")
                return kind(1) if kind in (int, float) else kind()
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.problem(f"key {path!r} must be {kind.__name__}, found {value!r}")
            return kind(1) if kind in (int, float) else kind()
        return value

    def parse(self, model: dict[str, Any], vlm: dict[str, Any]) -> AlpamayoConfig:
        model_type = self.get(model, "model_type", str)
        if model_type not in (ALPAMAYO_1_5, ALPAMAYO_R1):
            raise ConfigError(
                self.where,
                [f"key 'model_type' must be {ALPAMAYO_1_5!r} or {ALPAMAYO_R1!r}, found {model.get('model_type')!r}"],
            )
        if vlm.get("model_type") != "qwen3_vl":
            raise ConfigError(
                self.where, [f"backbone: key 'model_type' must be 'qwen3_vl', found {vlm.get('model_type')!r}"]
            )
        text = self.text(vlm)
        config = AlpamayoConfig(
            model_type=model_type,
            vlm_name_or_path=self.get(model, "vlm_name_or_path", str),
            vision=self.vision(vlm, text),
            text=text,
            expert=self.expert(model, text),
            action_in_proj=self.action_in_proj(model),
            action_space=self.action_space(model),
            flow=self.flow(model),
            history_tokenizer=self.history_tokenizer(model),
            tokens=self.tokens(model),
            tokens_per_history_traj=self.get(model, "tokens_per_history_traj", int),
            tokens_per_future_traj=self.get(model, "tokens_per_future_traj", int, 128),
            min_pixels=self.get(model, "min_pixels", int, 163840),
            max_pixels=self.get(model, "max_pixels", int, 196608),
            include_camera_ids=self.get(model, "include_camera_ids", bool, False),
            include_frame_nums=self.get(model, "include_frame_nums", bool, False),
            expert_non_causal=self.get(model, "expert_non_causal_attention", bool, True),
            raw=model,
            raw_vlm=vlm,
        )
        self.cross_check(config)
        if self.problems:
            raise ConfigError(self.where, self.problems)
        return config

    def text(self, vlm: dict[str, Any]) -> DecoderConfig:
        text = self.get(vlm, "text_config", dict)
        # transformers 4 writes rope_theta and rope_scaling, transformers 5 one block named rope_parameters.
        rope = {"rope_theta": text.get("rope_theta"), **(text.get("rope_scaling") or {})}
        rope.update(text.get("rope_parameters") or {})
        section = tuple(rope.get("mrope_section") or ())
        if len(section) != 3:
            self.problem(f"backbone: 'mrope_section' must have three entries, found {list(section)}")
            section = (1, 0, 0)
        if rope.get("mrope_interleaved") is False:
            self.problem("backbone: 'mrope_interleaved' must be true, found false")
        theta = rope.get("rope_theta")
        if not isinstance(theta, int | float):
            self.problem(f"backbone: 'rope_theta' must be a number, found {theta!r}")
            theta = 1.0
        if text.get("attention_bias"):
            self.problem("backbone: 'attention_bias' must be false, found true")
        if text.get("hidden_act", "silu") != "silu":
            self.problem(f"backbone: text 'hidden_act' must be 'silu', found {text['hidden_act']!r}")
        hidden = self.get(text, "hidden_size", int)
        heads = self.get(text, "num_attention_heads", int)
        return DecoderConfig(
            num_layers=self.get(text, "num_hidden_layers", int),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=self.get(text, "num_key_value_heads", int, heads),
            head_dim=self.get(text, "head_dim", int, max(hidden // max(heads, 1), 1)),
            intermediate_size=self.get(text, "intermediate_size", int),
            rms_norm_eps=self.get(text, "rms_norm_eps", float, 1e-6),
            rope_theta=float(theta),
            mrope_section=(int(section[0]), int(section[1]), int(section[2])),
        )

    def vision(self, vlm: dict[str, Any], text: DecoderConfig) -> VisionConfig:
        vision = self.get(vlm, "vision_config", dict)
        if vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            self.problem(f"backbone: vision 'hidden_act' must be 'gelu_pytorch_tanh', found {vision['hidden_act']!r}")
        config = VisionConfig(
            depth=self.get(vision, "depth", int),
            hidden_size=self.get(vision, "hidden_size", int),
            num_heads=self.get(vision, "num_heads", int),
            intermediate_size=self.get(vision, "intermediate_size", int),
            out_hidden_size=self.get(vision, "out_hidden_size", int),
            num_position_embeddings=self.get(vision, "num_position_embeddings", int),
            deepstack_layers=tuple(self.get(vision, "deepstack_visual_indexes", list)),
            patch_size=self.get(vision, "patch_size", int, 16),
            temporal_patch_size=self.get(vision, "temporal_patch_size", int, 2),
            spatial_merge_size=self.get(vision, "spatial_merge_size", int, 2),
            in_channels=self.get(vision, "in_channels", int, 3),
        )
        if config.out_hidden_size != text.hidden_size:
            self.problem(
                f"backbone: vision 'out_hidden_size' {config.out_hidden_size} must equal the text hidden size "
                f"{text.hidden_size}"
            )
        if config.hidden_size % max(config.num_heads, 1) or config.head_dim % 4:
            self.problem(
                f"backbone: vision hidden size {config.hidden_size} over {config.num_heads} heads must give a "
                "head_dim that is a multiple of 4"
            )
        if config.position_grid_side**2 != config.num_position_embeddings:
            self.problem(
                f"backbone: 'num_position_embeddings' must be a square, found {config.num_position_embeddings}"
            )
        return config

    def expert(self, model: dict[str, Any], text: DecoderConfig) -> DecoderConfig:
        # What expert_cfg does not name, the expert inherits from the language model, as the release's code does.
        own = self.get(model, "expert_cfg", dict)
        if own.get("num_hidden_layers", text.num_layers) != text.num_layers:
            self.problem(
                f"expert_cfg: 'num_hidden_layers' must equal the language model's {text.num_layers} (layer i attends "
                f"to cache layer i), found {own['num_hidden_layers']}"
            )
        heads = self.get(own, "num_attention_heads", int, text.num_heads)
        return DecoderConfig(
            num_layers=text.num_layers,
            hidden_size=self.get(own, "hidden_size", int, text.hidden_size),
            num_heads=heads,
            num_kv_heads=self.get(own, "num_key_value_heads", int, text.num_kv_heads),
            head_dim=self.get(own, "head_dim", int, text.head_dim),
            intermediate_size=self.get(own, "intermediate_size", int, text.intermediate_size),
            rms_norm_eps=self.get(own, "rms_norm_eps", float, text.rms_norm_eps),
            rope_theta=text.rope_theta,
            mrope_section=text.mrope_section,
        )

    def target(self, model: dict[str, Any], key: str, expected: str) -> dict[str, Any]:
        """A Hydra block whose ``_target_`` must end with one class name: we build our own module for it."""
        block: dict[str, Any] = self.get(model, key, dict)
        name = str(block.get("_target_", "")).rsplit(".", 1)[-1]
        if block and name != expected:
            self.problem(f"{key}: '_target_' must be {expected}, found {block.get('_target_')!r}")
        return block

    def action_in_proj(self, model: dict[str, Any]) -> ActionInProjConfig:
        block = self.target(model, "action_in_proj_cfg", "PerWaypointActionInProjV2")
        if isinstance(model.get("action_out_proj_cfg"), dict):
            self.target(model, "action_out_proj_cfg", "Linear")
        return ActionInProjConfig(
            hidden_size=self.get(block, "hidden_size", int, 1024),
            num_enc_layers=self.get(block, "num_enc_layers", int, 4),
            num_fourier_feats=self.get(block, "num_fourier_feats", int, 20),
            max_freq=self.get(block, "max_freq", float, 100.0),
        )

    def action_space(self, model: dict[str, Any]) -> ActionSpaceConfig:
        block = self.target(model, "action_space_cfg", "UnicycleAccelCurvatureActionSpace")
        default = ActionSpaceConfig()
        values: dict[str, Any] = {}
        for name in ActionSpaceConfig.__dataclass_fields__:
            known = getattr(default, name)
            if isinstance(known, tuple):
                pair = block.get(name, known)
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    self.problem(f"action_space_cfg: {name!r} must be a pair of numbers, found {pair!r}")
                    pair = known
                values[name] = (float(pair[0]), float(pair[1]))
            else:
                values[name] = self.get(block, name, type(known), known)
        return ActionSpaceConfig(**values)

    def flow(self, model: dict[str, Any]) -> FlowMatchingConfig:
        block = self.target(model, "diffusion_cfg", "FlowMatching")
        if block.get("int_method", "euler") != "euler":
            self.problem(f"diffusion_cfg: 'int_method' must be 'euler', found {block['int_method']!r}")
        return FlowMatchingConfig(
            num_inference_steps=self.get(block, "num_inference_steps", int, 10),
            inference_guidance_weight=self.get(block, "inference_guidance_weight", float, 1.0),
        )

    def history_tokenizer(self, model: dict[str, Any]) -> HistoryTokenizerConfig:
        block = self.target(model, "hist_traj_tokenizer_cfg", "DeltaTrajectoryTokenizer")
        if block.get("predict_yaw"):
            self.problem("hist_traj_tokenizer_cfg: 'predict_yaw' must be false, found true")
        default = HistoryTokenizerConfig()
        low = tuple(float(v) for v in block.get("ego_xyz_min", default.ego_xyz_min))
        high = tuple(float(v) for v in block.get("ego_xyz_max", default.ego_xyz_max))
        if len(low) != 3 or len(high) != 3:
            self.problem("hist_traj_tokenizer_cfg: 'ego_xyz_min' and 'ego_xyz_max' must have three entries")
            low, high = default.ego_xyz_min, default.ego_xyz_max
        return HistoryTokenizerConfig(
            ego_xyz_min=(low[0], low[1], low[2]),
            ego_xyz_max=(high[0], high[1], high[2]),
            num_bins=self.get(block, "num_bins", int, default.num_bins),
        )

    def tokens(self, model: dict[str, Any]) -> TokenConfig:
        start = self.get(model, "traj_token_start_idx", int)
        future = model.get("traj_tokenizer_cfg")
        # History bins stand behind the future bins where the checkpoint has a tokenizer for the future.
        future_bins = self.get(future, "num_bins", int) if isinstance(future, dict) else 0
        ids = self.get(model, "traj_token_ids", dict)
        return TokenConfig(
            vocab_size=self.get(model, "vocab_size", int),
            traj_token_start=start,
            traj_vocab_size=self.get(model, "traj_vocab_size", int),
            history_token_start=start + future_bins,
            history=self.get(ids, "history", int),
            history_start=self.get(ids, "history_start", int),
            history_end=self.get(ids, "history_end", int),
            future_start=self.get(ids, "future_start", int),
            future_end=self.get(ids, "future_end", int),
        )

    def cross_check(self, config: AlpamayoConfig) -> None:
        for name, decoder in (("text", config.text), ("expert", config.expert)):
            if decoder.num_heads % max(decoder.num_kv_heads, 1):
                self.problem(
                    f"{name}: {decoder.num_heads} heads are not a multiple of {decoder.num_kv_heads} key/value heads"
                )
        if (config.expert.num_kv_heads, config.expert.head_dim) != (config.text.num_kv_heads, config.text.head_dim):
            self.problem(
                f"expert: key/value heads x head_dim must equal the language model's {config.text.num_kv_heads} x "
                f"{config.text.head_dim} (one cache serves both), found {config.expert.num_kv_heads} x "
                f"{config.expert.head_dim}"
            )
        section, head_dim = config.text.mrope_section, config.text.head_dim
        if sum(section) != head_dim // 2 or 3 * max(section[1:]) > head_dim // 2:
            self.problem(f"backbone: 'mrope_section' {list(section)} does not fit head_dim {head_dim}")
        if len(config.vision.deepstack_layers) > config.text.num_layers:
            self.problem("backbone: more DeepStack levels than language-model layers")
        if any(not 0 <= i < config.vision.depth for i in config.vision.deepstack_layers):
            self.problem(
                f"backbone: 'deepstack_visual_indexes' {list(config.vision.deepstack_layers)} outside the "
                f"{config.vision.depth} vision blocks"
            )
        tokens = config.tokens
        if config.tokens_per_history_traj % 3:
            self.problem(
                f"key 'tokens_per_history_traj' must be a multiple of 3, found {config.tokens_per_history_traj}"
            )
        last_bin = tokens.history_token_start + config.history_tokenizer.num_bins
        if last_bin > tokens.traj_token_start + tokens.traj_vocab_size:
            self.problem(
                f"history bins end at id {last_bin}, beyond the {tokens.traj_vocab_size} trajectory tokens that start "
                f"at {tokens.traj_token_start}"
            )
        if max(tokens.history, tokens.future_start, last_bin - 1) >= tokens.vocab_size:
            self.problem(f"key 'vocab_size' {tokens.vocab_size} is smaller than the token ids in use")
        if not 0 < config.min_pixels <= config.max_pixels:
            self.problem(f"0 < min_pixels <= max_pixels is required, found {config.min_pixels}, {config.max_pixels}")
