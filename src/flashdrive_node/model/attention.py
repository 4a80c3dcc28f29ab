"""Grouped-query attention over a slice of the cache, without expanding keys and values where it can be avoided."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of few queries to many keys.

    The query heads that share a key/value head are laid side by side as further query rows, so keys and values are
    read once per group and never repeated in memory.

    Args:
        q: [T, heads, head_dim].
        k, v: [kv_heads, S, head_dim].
        mask: True where a query may look, [T, S]; None where every query sees every slot.

    Returns:
        [T, heads * head_dim].
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    q = q.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * tokens, dim)
    if mask is not None:
        mask = mask.expand(group, *mask.shape).reshape(group * tokens, -1)
    out = scaled_dot_product_attention(q, k[None], v[None], attn_mask=mask)
    return out.view(kv_heads, group, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads * dim)


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a sequence to itself.

    Args:
        q: [T, heads, head_dim].
        k, v: [kv_heads, T, head_dim].

    Returns:
        [T, heads * head_dim].
    """
    tokens, heads, dim = q.shape
    if q.device.type == "cpu":
        # The grouped form of the CPU kernel writes out the whole score matrix; repeated heads do not.
        group = heads // k.shape[0]
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=k.shape[0] != heads
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * dim)
