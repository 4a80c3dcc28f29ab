"""The Qwen3 decoder stack. The language model and the action expert are both made of it.

Projections that share an input are one matrix: rows are q, k, v and gate, up. Activations carry no batch dimension:
one context is [T, hidden], and rows that share a prefix are further tokens told apart by a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from flashdrive_node.model.attention import attend, attend_causal, group_mask
from flashdrive_node.model.config import DecoderConfig
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.rope import rotate

#: Called as observe(name, tensor) with intermediate values; used to compare with recordings, None everywhere else.
Observe = Callable[[str, Tensor], None]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]; the mean is taken in float32 inside the kernel."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """Pre-norm attention with per-head q/k norms, then a SwiGLU MLP."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.q_size, self.kv_size, self.head_dim = config.q_size, config.kv_size, config.head_dim
        self.group_size = config.group_size
        self.input_norm = RMSNorm(hidden, eps)
        self.qkv = nn.Linear(hidden, config.q_size + 2 * config.kv_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps)
        self.k_norm = RMSNorm(config.head_dim, eps)
        self.o_proj = nn.Linear(config.q_size, hidden, bias=False)
        self.post_norm = RMSNorm(hidden, eps)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] -> q [T, heads, head_dim], k and v [T, kv_heads, head_dim], before rotation."""
        q, k, v = self.qkv(self.input_norm(x)).split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP: x [T, hidden], attended [T, q_size] -> [T, hidden]."""
        x = x + self.o_proj(attended)
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        if not x.is_cuda:
            # The CPU kernel rounds the odd values at a row's end in another way than in the reference's whole tensor.
            gate = gate.contiguous()
        return x + self.down(silu(gate) * up)


def run_layers(
    layers: nn.ModuleList,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache,
    start: int,
    mask: Tensor | None = None,
    causal: bool = False,
    after_layer: Callable[[int, Tensor], Tensor] | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Run T tokens through the stack; their keys and values go to slots ``start .. start + T``.

    Args:
        layers: DecoderLayer modules; layer i uses layer i of the cache.
        x: Input embeddings [T, hidden].
        cos, sin: Rotations [T, head_dim].
        cache: Context that the tokens attend to, besides themselves.
        start: First slot of the new tokens; slots before it are the context.
        mask: True where a token may look, [T, start + T]; None where every token sees every slot (or see `causal`).
        causal: The tokens start a context (``start`` 0) and each sees itself and what is before it.
        after_layer: Called as after_layer(i, x) -> x behind every layer (DeepStack).
        observe: Receives "k_pre_rope.i", "v_proj.i" and "layer_out.i".

    Returns:
        Hidden states behind the last layer, before the final norm: [T, hidden].
    """
    if mask is not None:
        mask = group_mask(mask, cast(DecoderLayer, layers[0]).group_size, x.dtype)
    for i, module in enumerate(layers):
        layer = cast(DecoderLayer, module)
        q, k, v = layer.project(x)
        if observe:
            observe(f"k_pre_rope.{i}", k)
            observe(f"v_proj.{i}", v)
        keys, values = cache.write(i, start, rotate(k, cos, sin), v)
        q = rotate(q, cos, sin)
        attended = attend_causal(q, keys, values) if causal else attend(q, keys, values, mask)
        x = layer.finish(x, attended)
        if observe:
            observe(f"layer_out.{i}", x)
        if after_layer:
            x = after_layer(i, x)
    return x
