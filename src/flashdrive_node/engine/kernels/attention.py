"""Grouped-query attention over a cache whose visible part is known to the device alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.engine.kernels.quantised_linear import Rows, row_format
from flashdrive_node.engine.kernels.visibility import Visible
from flashdrive_node.model import attention


def attend_visible(q: Tensor, keys: Tensor, values: Tensor, visible: Visible) -> Tensor:
    """Attention of queries to the slots that each may see; slots that none sees may hold anything, NaN too.

    The cost grows with the visible slots, not with those allocated.

    Args:
        q: [T, heads, head_dim], head_dim contiguous.
        keys, values: A layer of the cache with all its slots, [kv_heads, slots, head_dim].
        visible: Of the T queries, on the same device.

    Returns:
        [T, heads * head_dim] in q's type; 0 for a query that sees nothing.

    Raises:
        ValueError: Shapes or types that do not belong together.
    """
    _check(q, keys, values, visible)
    if uses_triton(q) and _suits_triton(q):
        from flashdrive_node.engine.kernels.triton_attention import attend_visible as run

        return run(q, keys, values, visible)
    return attend_visible_reference(q, keys, values, visible)


def attend_for(reader: nn.Module, q: Tensor, keys: Tensor, values: Tensor, visible: Visible) -> Rows:
    """`attend_visible`, as the layer that reads it takes it."""
    form = row_format(reader, q)
    if form is None or form.group_size is not None or not _suits_triton(q):
        return attend_visible(q, keys, values, visible)
    from flashdrive_node.engine.kernels.triton_attention import attend_round

    _check(q, keys, values, visible)
    return attend_round(q, keys, values, visible, form)


def attend_visible_reference(q: Tensor, keys: Tensor, values: Tensor, visible: Visible) -> Tensor:
    """`attend_visible` by a dense mask, with the rounding of `model.attention.attend`."""
    if q.device.type == "cpu":
        mask, hidden, whole = visible.seen
        keys, values = keys[:, : mask.shape[1]], values[:, : mask.shape[1]]
        if whole:
            return attention.attend(q, keys, values)
    else:  # nothing may wait for the device, so its numbers are not looked at
        mask = visible.mask(keys.shape[1])
        hidden = ~mask.any(dim=0)[:, None]
    if hidden is not None:
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
    bias = attention.group_mask(mask, q.shape[1] // keys.shape[0], q.dtype)
    out = attention.attend(q, keys, values, bias)
    return out.masked_fill(~mask.any(dim=1)[:, None], 0)


def _check(q: Tensor, keys: Tensor, values: Tensor, visible: Visible) -> None:
    fits = (
        q.ndim == keys.ndim == 3
        and keys.shape == values.shape
        and q.shape[2] == keys.shape[2]
        and q.shape[1] % keys.shape[0] == 0
        and q.dtype == keys.dtype == values.dtype
        and len(visible.limits) == len(q)
    )
    if not fits:
        raise ValueError(
            "attention: q [T, heads, d], keys and values [kv_heads, slots, d] of one type, heads a multiple of "
            f"kv_heads, and visibility of T queries are required, found {list(q.shape)} {q.dtype}, {list(keys.shape)} "
            f"{keys.dtype}, {list(values.shape)} {values.dtype} and {len(visible.limits)} queries"
        )
    if q.stride(2) != 1 or keys.stride(2) != 1 or values.stride() != keys.stride():
        raise ValueError("attention: contiguous head_dim, and keys and values laid out alike are required")


def _suits_triton(q: Tensor) -> bool:
    """Matrix instructions want head_dim as a power of two; the kernel has no backward pass."""
    return q.shape[2] in (16, 32, 64, 128, 256) and not (torch.is_grad_enabled() and q.requires_grad)
