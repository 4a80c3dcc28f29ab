"""A pass of a decoder stack over tokens that stand anywhere in the cache, not only behind its end.

The same sums as `run_layers`, cut into kernels in another way: what stands between two matrix products is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from flashdrive_node.engine.kernels.linear import gated_project, project, project_parts
from flashdrive_node.engine.kernels.quantised_linear import Rows, add_norm_for, norm_for
from flashdrive_node.engine.kernels.rotary import HeadNorms, KeptKeys, norm_rope_write
from flashdrive_node.model.decoder import DecoderLayer, RMSNorm
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.language import LanguageModel

#: Attention of queries [T, heads, head_dim] to a layer's keys and values [kv_heads, slots, head_dim], of which the
#: whole cache is given: [T, heads * head_dim], maybe as the layer that reads it takes it, which is given last. In the
#: last layer the queries may be the last ones alone (`wanted`).
Attention = Callable[[Tensor, Tensor, Tensor, nn.Module], Rows]


def run_at_slots(
    layers: nn.ModuleList,
    final_norm: nn.Module,
    x: Tensor,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: KVCache,
    attention: Attention,
    kept: Callable[[int], KeptKeys] | None = None,
    tap: Callable[[int, Tensor], None] | None = None,
    added: Callable[[int], tuple[Tensor, Tensor] | None] | None = None,
    wanted: int | None = None,
) -> Tensor:
    """Run tokens through a stack, writing their keys and values to given slots.

    Args:
        layers: DecoderLayer modules of the language model or the expert.
        final_norm: RMSNorm behind the last layer.
        x: Input embeddings [T, hidden].
        rotation: Of `mrope_cos_sin`, [T, head_dim] each.
        slots: Where each token stands, int64 [T], each once.
        cache: Written before it is attended to, layer by layer; `used` is left alone.
        attention: Decides what each token sees.
        kept: Where a layer's keys before rotation go.
        tap: Shown every layer's output [T, hidden], which it may not change; of the last layer that of wanted tokens.
        added: What comes on top of a layer's output: rows, int64 [n], and their values [n, hidden].
        wanted: How many of the last tokens are asked for, by default all. Of the others the last layer computes keys
            and values alone.

    Returns:
        Hidden states behind the final norm, [wanted, hidden].
    """
    cos, sin = rotation
    stack = [cast(DecoderLayer, layer) for layer in layers]
    # Every norm, and the layer that reads it: the format of its weight says what the norm's kernel makes.
    norms = [*((layer.input_norm, layer.qkv) for layer in stack), (cast(RMSNorm, final_norm), None)]
    hidden = norm_for(norms[0][1], x, norms[0][0])
    for i, (layer, (_, (next_norm, reader))) in enumerate(zip(stack, pairwise(norms), strict=True)):
        heads = HeadNorms(layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.eps)
        keys, values = cache.keys[i], cache.values[i]
        q = norm_rope_write(
            project_parts(hidden, layer.qkv),
            heads,
            cos,
            sin,
            keys,
            values,
            slots,
            None if kept is None else kept(i),
        )
        extra = None if added is None else added(i)
        if i == len(stack) - 1 and wanted is not None and extra is None:
            q, x = q[len(q) - wanted :], x[len(x) - wanted :]
            if not wanted:
                return x
        update = project_parts(attention(q, keys, values, layer.o_proj), layer.o_proj)
        x, hidden = add_norm_for(layer.gate_up, x, update, layer.post_norm)
        gated = gated_project(hidden, layer.gate_up, layer.down)
        if extra is None:
            update = project_parts(gated, layer.down)
            x, hidden = add_norm_for(reader, x, update, next_norm)
        else:
            x = x + project(gated, layer.down)
        if tap is not None:
            tap(i, x)
        if extra is not None:
            x = x.index_add(0, *extra)
            hidden = norm_for(reader, x, next_norm)
    result = cast(Tensor, hidden)  # of the final norm, which no layer reads
    return result if wanted is None else result[len(result) - wanted :]


def next_logits(language: LanguageModel, hidden: Tensor) -> Tensor:
    """Next-token logits in the model's type, for few tokens: [T, hidden] -> [T, vocabulary]."""
    return project(hidden, language.lm_head)
