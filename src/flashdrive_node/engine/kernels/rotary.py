"""What stands between the q/k/v projection and attention: norms of the heads, rotation, and the way into the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.engine.kernels.parts import is_parts, summed
from flashdrive_node.engine.kernels.quantised_linear import whole
from flashdrive_node.engine.kernels.row_formats import Unscaled
from flashdrive_node.model.rope import rotate


@dataclass(frozen=True, eq=False)
class KeptKeys:
    """Where keys before rotation are kept for tokens that will be moved (see `Stream`)."""

    #: A layer's store, [kv_heads, places, head_dim].
    store: Tensor
    #: Place of each token, int64 [T]; tokens that need not be kept all name one spare place.
    places: Tensor


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """Scales of a layer's q and k norms, [head_dim] each."""

    q: Tensor
    k: Tensor
    eps: float


def norm_rope_write(
    qkv: Tensor | Unscaled,
    norms: HeadNorms,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    kept: KeptKeys | None = None,
) -> Tensor:
    """Norm and rotate queries and keys; write keys and values to their slots of a layer's cache.

    Roundings are those of `DecoderLayer.project` and of `rotate` on a GPU: behind the norm, behind the product with the
    cosine, and behind the sum.

    Args:
        qkv: Output of the projection, rows q, k, v: [T, (heads + 2 kv_heads) * head_dim], contiguous, or its parts (see
            `parts`), or the product in front of its scales.
        norms: Of the layer.
        cos, sin: Rotations as `rotate` takes them, [T, head_dim], in qkv's type or float32.
        keys, values: A layer of the cache, [kv_heads, slots, head_dim].
        slots: Where each token stands, int64 [T], each once.
        kept: Receives keys before rotation.

    Returns:
        Rotated queries [T, heads, head_dim].

    Raises:
        ValueError: Shapes or types that do not belong together.
    """
    _check(qkv.sums if isinstance(qkv, Unscaled) else qkv, cos, sin, keys, values, slots)
    if uses_triton(keys) and keys.shape[2] in (16, 32, 64, 128, 256):
        from flashdrive_node.engine.kernels.triton_rotary import norm_rope_write as run

        return run(qkv, norms, cos, sin, keys, values, slots, kept)
    qkv = whole(qkv, keys.dtype) if isinstance(qkv, Unscaled) else qkv
    return norm_rope_write_reference(qkv, norms, cos, sin, keys, values, slots, kept)


def norm_rope_write_reference(
    qkv: Tensor,
    norms: HeadNorms,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    kept: KeptKeys | None = None,
) -> Tensor:
    """`norm_rope_write` step by step."""
    kv_heads, _, dim = keys.shape
    kv_size = kv_heads * dim
    qkv = summed(qkv, keys.dtype)
    parts = qkv.split((qkv.shape[1] - 2 * kv_size, kv_size, kv_size), dim=1)
    q, k, v = (part.unflatten(1, (-1, dim)) for part in parts)
    q, k = rms_norm(q, (dim,), norms.q, norms.eps), rms_norm(k, (dim,), norms.k, norms.eps)
    if kept is not None:
        kept.store.index_copy_(1, kept.places, k.transpose(0, 1))
    keys.index_copy_(1, slots, rotate(k, cos, sin).to(k.dtype).transpose(0, 1))
    values.index_copy_(1, slots, v.transpose(0, 1))
    return rotate(q, cos, sin).to(q.dtype)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    (tokens, width), (kv_heads, _, dim) = qkv.shape[-2:], keys.shape
    heads = width // dim - 2 * kv_heads
    fits = (
        qkv.is_contiguous()
        and qkv.shape[-2:] == (tokens, (heads + 2 * kv_heads) * dim)
        and heads > 0
        and cos.shape == sin.shape == (tokens, dim)
        and keys.shape == values.shape
        and keys.stride() == values.stride()
        and slots.shape == (tokens,)
        and qkv.dtype == (torch.float32 if is_parts(qkv) else keys.dtype)
        and keys.dtype == values.dtype
    )
    if not fits:
        raise ValueError(
            "rotary: contiguous qkv [T, (heads + 2 kv_heads) * d] or its float32 parts, cos and sin [T, d], keys and "
            "values laid out alike [kv_heads, slots, d] of qkv's type and slots [T] are required, found "
            f"{list(qkv.shape)} {qkv.dtype}, {list(cos.shape)}, {list(sin.shape)}, {list(keys.shape)} {keys.dtype}, "
            f"{list(values.shape)} and {list(slots.shape)}"
        )
    if slots.dtype != torch.int64:
        raise ValueError(f"rotary: slots must be int64, found {slots.dtype}")
