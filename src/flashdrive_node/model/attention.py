"""Grouped-query attention over a slice of the cache, without expanding keys and values where it can be avoided."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of few queries to many keys.

    The query heads that share a key/value head are laid side by side as further query rows, so keys and values are
    read once per group and never repeated in memory. On the CPU they are repeated, as in the reference: its results
    are matched to the bit there.

    Args:
        q: [T, heads, head_dim].
        k, v: [kv_heads, S, head_dim].
        mask: Of `group_mask`; None where every query sees every slot.

    Returns:
        [T, heads * head_dim].
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    if q.device.type == "cpu":
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
        mask = None if mask is None else mask[:tokens]  # equal for all heads of a group
        out = scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask)
        return out[0].transpose(0, 1).reshape(tokens, heads * dim)
    q = q.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * tokens, dim)
    out = scaled_dot_product_attention(q, k[None], v[None], attn_mask=mask)
    return out.view(kv_heads, group, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads * dim)


def group_mask(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """A mask in the form that `attend` reads, made once for all layers.

    Args:
        mask: True where a query may look, [T, S].
        group: Query heads per key/value head.
        dtype: Type of the queries.

    Returns:
        What is added to the scores, [group * T, S]. Rows lie 16 elements aligned, without which the GPU kernel would
        copy the mask in every layer.
    """
    tokens, slots = mask.shape
    rows = torch.zeros(group, tokens, -(-slots // 16) * 16, dtype=dtype, device=mask.device)
    rows[..., :slots].masked_fill_(~mask, -torch.inf)
    return rows.flatten(0, 1)[:, :slots]


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the end of a sequence to the sequence: each query sees itself and what is before it.

    Args:
        q: The last T tokens, [T, heads, head_dim].
        k, v: All S tokens, [kv_heads, S, head_dim].

    Returns:
        [T, heads * head_dim].
    """
    tokens, heads, dim = q.shape
    if q.device.type == "cpu":
        # The grouped form of the CPU kernel writes out the whole score matrix; repeated heads do not.
        group = heads // k.shape[0]
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    whole = k.shape[1] == tokens
    mask = None
    if not whole:
        # Imports the compiler: a second that only those pay who come here.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(tokens, k.shape[1])
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        # `is_causal` lines up first tokens; the bias lines up last ones, and kernels that can take it as a flag do.
        attn_mask=mask,
        is_causal=whole,
        enable_gqa=k.shape[0] != heads,
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * dim)
