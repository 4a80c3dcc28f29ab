"""Architecture of a checkpoint. `config_parser` reads it from the checkpoint's and the backbone's ``config.json``.

Every dimension of the networks comes from here; nothing is a constant in the modules. Deployment settings (sample
count, temperatures, devices) are not architecture and do not live here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: ``model_type`` of the two public architectures.
ALPAMAYO_1_5 = "alpamayo1_5"
ALPAMAYO_R1 = "alpamayo_r1"


@dataclass(frozen=True)
class VisionConfig:
    """Qwen3-VL vision tower."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_layers: tuple[int, ...]
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def position_grid_side(self) -> int:
        """Side of the square table of learned position embeddings."""
        return int(self.num_position_embeddings**0.5 + 0.5)

    @property
    def patch_features(self) -> int:
        """Values in one flattened patch row: channel x temporal x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Channels of one merged group of ``spatial_merge_size`` squared patches."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def resize_factor(self) -> int:
        """Image sides are multiples of this many pixels, so that patches merge without a remainder."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class DecoderConfig:
    """A Qwen3 decoder stack; the language model and the action expert are both of this kind."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key (and of the value) projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class ActionInProjConfig:
    """Encoder of noisy waypoints: Fourier features, then an MLP (``PerWaypointActionInProjV2``)."""

    hidden_size: int = 1024
    num_enc_layers: int = 4
    num_fourier_feats: int = 20
    max_freq: float = 100.0


@dataclass(frozen=True)
class ActionSpaceConfig:
    """Unicycle action space: acceleration in m/s^2 and curvature in 1/m, normalised (``UnicycleAccelCurvature``)."""

    accel_mean: float = 0.0
    accel_std: float = 1.0
    curvature_mean: float = 0.0
    curvature_std: float = 1.0
    accel_bounds: tuple[float, float] = (-9.8, 9.8)
    curvature_bounds: tuple[float, float] = (-0.2, 0.2)
    dt: float = 0.1
    n_waypoints: int = 64
    theta_lambda: float = 1e-6
    theta_ridge: float = 1e-8
    v_lambda: float = 1e-6
    v_ridge: float = 1e-4
    a_lambda: float = 1e-4
    a_ridge: float = 1e-4
    kappa_lambda: float = 1e-4
    kappa_ridge: float = 1e-4

    @property
    def horizon_s(self) -> float:
        """Time of the last waypoint after t0, seconds."""
        return self.dt * self.n_waypoints


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Euler integration of the velocity field from noise (t = 0) to action (t = 1)."""

    num_inference_steps: int = 10
    inference_guidance_weight: float = 1.0


@dataclass(frozen=True)
class HistoryTokenizerConfig:
    """Bins of the ego-history differences (``DeltaTrajectoryTokenizer``), metres."""

    ego_xyz_min: tuple[float, float, float] = (-4.0, -4.0, -10.0)
    ego_xyz_max: tuple[float, float, float] = (4.0, 4.0, 10.0)
    num_bins: int = 1000


@dataclass(frozen=True)
class TokenConfig:
    """Ids of the extended vocabulary that the model's code needs by number."""

    vocab_size: int
    traj_token_start: int
    traj_vocab_size: int
    #: First id of the history bins: the future bins come first where the checkpoint has a future tokenizer.
    history_token_start: int
    history: int
    history_start: int
    history_end: int
    future_start: int
    future_end: int


@dataclass(frozen=True)
class AlpamayoConfig:
    """Everything that the architecture of one checkpoint needs."""

    model_type: str
    vlm_name_or_path: str
    vision: VisionConfig
    text: DecoderConfig
    expert: DecoderConfig
    action_in_proj: ActionInProjConfig
    action_space: ActionSpaceConfig
    flow: FlowMatchingConfig
    history_tokenizer: HistoryTokenizerConfig
    tokens: TokenConfig
    tokens_per_history_traj: int
    tokens_per_future_traj: int
    min_pixels: int
    max_pixels: int
    include_camera_ids: bool
    include_frame_nums: bool
    expert_non_causal: bool
    #: The two files as they were read, so that saving writes the same keys back.
    raw: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)
    raw_vlm: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def history_poses(self) -> int:
        """Ego poses in the prompt; each takes three tokens (x, y, z)."""
        return self.tokens_per_history_traj // 3

    @property
    def supports_navigation(self) -> bool:
        """Whether the prompt has a place for navigation text and questions (Alpamayo 1.5)."""
        return self.model_type == ALPAMAYO_1_5
