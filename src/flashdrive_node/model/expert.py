"""The action expert: noisy waypoints and flow time to the velocity of the flow.

Layer i attends to the language model's cache of layer i, then to its own waypoint tokens. Flow time enters only through
the input features. The projections in and out run in float32: they are small, and Fourier features of up to 100 Hz
lose most of their meaning in bfloat16.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from flashdrive_node.model.config import ActionInProjConfig, AlpamayoConfig
from flashdrive_node.model.decoder import DecoderLayer, Observe, RMSNorm, run_layers
from flashdrive_node.model.kv_cache import KVCache

#: Epsilon of the norms in the input projection (fixed in the reference).
ENCODER_EPS = 1e-5


def fourier_frequencies(config: ActionInProjConfig) -> Tensor:
    """Log-spaced frequencies from 1 to max_freq, float32 [num_fourier_feats / 2]."""
    return torch.logspace(0, math.log10(config.max_freq), steps=config.num_fourier_feats // 2)


class ActionInProj(nn.Module):
    """Fourier features of each action channel and of the time, then an MLP with RMS norms (float32 throughout)."""

    frequencies: Tensor

    def __init__(self, config: ActionInProjConfig, channels: int, out_size: int):
        super().__init__()
        features = (config.num_fourier_feats // 2) * 2
        sizes = [features * (channels + 1), *[config.hidden_size] * config.num_enc_layers, out_size]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(RMSNorm(config.hidden_size, ENCODER_EPS) for _ in range(config.num_enc_layers))
        self.out_norm = nn.LayerNorm(out_size, eps=ENCODER_EPS)
        # One row per action channel, the last for the time; rows are equal, but files of R1 hold them one by one.
        self.register_buffer("frequencies", fourier_frequencies(config).expand(channels + 1, -1).clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy actions [N, channels] and flow time (scalar or [N]) in float32 -> waypoint embeddings [N, out_size]."""
        return self.embed(x, self.time_part(t.reshape(-1)))

    def time_part(self, t: Tensor) -> Tensor:
        """What flow times add to the first layer's sums, its bias included: float32 [K] -> [K, hidden].

        A schedule's times are known before it runs, so this needs to be computed only once.
        """
        features, first = self._fourier(t[:, None], self.frequencies[-1:]), cast(nn.Linear, self.linears[0])
        return linear(features, first.weight[:, -features.shape[1] :], first.bias)

    def embed(self, x: Tensor, time_part: Tensor) -> Tensor:
        """Noisy actions [N, channels] and the `time_part` of their times, [N or 1, hidden] -> [N, out_size]."""
        features = self._fourier(x, self.frequencies[:-1])
        first = cast(nn.Linear, self.linears[0])
        y = linear(features, first.weight[:, : features.shape[1]]) + time_part
        for norm, dense in zip(self.norms, self.linears[1:], strict=True):
            y = dense(norm(silu(y)))
        return self.out_norm(y)

    @staticmethod
    def _fourier(values: Tensor, frequencies: Tensor) -> Tensor:
        """Features of numbers [N, channels], channel by channel: [N, channels * 2 * frequencies]."""
        angles = values[..., None] * frequencies * 2 * torch.pi
        return (torch.cat((angles.sin(), angles.cos()), dim=-1) * math.sqrt(2)).flatten(1)


class ActionExpert(nn.Module):
    """Decoder stack over waypoint tokens with its projections in and out."""

    def __init__(self, config: AlpamayoConfig):
        super().__init__()
        expert, channels = config.expert, 2
        self.config = expert
        self.action_in_proj = ActionInProj(config.action_in_proj, channels, expert.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(expert) for _ in range(expert.num_layers))
        self.norm = RMSNorm(expert.hidden_size, expert.rms_norm_eps)
        self.action_out_proj = nn.Linear(expert.hidden_size, channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache,
        mask: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Velocity of the flow at (x, t).

        The waypoints' keys and values are written behind the context and count as unused afterwards, so every step of
        the integration overwrites the same slots and the context itself is never copied.

        Args:
            x: Noisy normalised actions of all samples, float32 [samples * waypoints, 2].
            t: Flow time in 0..1, float32 scalar.
            cos, sin: Rotations [samples * waypoints, head_dim].
            cache: Context of the language model.
            mask: True where a waypoint may look, [samples * waypoints, used + samples * waypoints]; None for all.
            observe: Receives "in_proj", "expert_out" and what `run_layers` gives.

        Returns:
            float32 [samples * waypoints, 2].
        """
        cache.require(cache.used + x.shape[0])
        y = self.action_in_proj(x, t)
        if observe:
            observe("in_proj", y)
        y = y.to(self.norm.weight.dtype)
        y = run_layers(self.layers, y, cos, sin, cache, cache.used, mask, observe=observe)
        y = self.norm(y)
        if observe:
            observe("expert_out", y)
        return self.action_out_proj(y.float())
