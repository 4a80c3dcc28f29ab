"""A pass of the language model over tokens that stand anywhere in the cache, not only behind its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from flashdrive_node.model.decoder import DecoderLayer, Observe
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.language import LanguageModel
from flashdrive_node.model.rope import mrope_cos_sin, rotate

#: Attention of queries [T, heads, head_dim] to a layer's keys and values [kv_heads, slots, head_dim], of which the
#: whole cache is given: [T, heads * head_dim].
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_at_slots(
    language: LanguageModel,
    x: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: KVCache,
    attention: Attention,
    after_layer: Callable[[int, Tensor], Tensor] | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Run tokens through the language model, writing their keys and values to given slots.

    Args:
        language: The network.
        x: Input embeddings [T, hidden].
        positions: On the three axes, [3, T].
        slots: Where each token stands, int64 [T], each once.
        cache: Written before it is attended to, layer by layer; `used` is left alone.
        attention: Decides what each token sees.
        after_layer, observe: See `run_layers`.

    Returns:
        Hidden states before the final norm, [T, hidden].
    """
    cos, sin = mrope_cos_sin(positions, language.config, x.dtype)
    for i, module in enumerate(language.layers):
        layer = cast(DecoderLayer, module)
        q, k, v = layer.project(x)
        if observe:
            observe(f"k_pre_rope.{i}", k)
            observe(f"v_proj.{i}", v)
        keys, values = cache.keys[i], cache.values[i]
        keys.index_copy_(1, slots, rotate(k, cos, sin).transpose(0, 1))
        values.index_copy_(1, slots, v.transpose(0, 1))
        x = layer.finish(x, attention(rotate(q, cos, sin), keys, values))
        if observe:
            observe(f"layer_out.{i}", x)
        if after_layer:
            x = after_layer(i, x)
    return x
