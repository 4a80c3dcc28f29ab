"""A pass over some tokens of a prompt, while the cache holds the others."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import embedding

from flashdrive_node.engine.kernels.attention import attend_for
from flashdrive_node.engine.kernels.quantised_linear import Rows
from flashdrive_node.engine.kernels.rotary import KeptKeys
from flashdrive_node.engine.kernels.visibility import up_to
from flashdrive_node.engine.slot_pass import run_at_slots
from flashdrive_node.engine.taps import Taps
from flashdrive_node.engine.window_plan import WindowPlan
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.attention import attend_causal
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.rope import mrope_cos_sin
from flashdrive_node.model.vision import VisionFeatures


def run_rows(
    model: Alpamayo,
    plan: WindowPlan,
    ids: Tensor,
    cache: KVCache,
    features: VisionFeatures,
    kept: Callable[[int], KeptKeys] | None = None,
    taps: Taps | None = None,
) -> Tensor:
    """Compute some tokens of a prompt, while the cache holds the others.

    Args:
        model: The network.
        plan: The window, and which of its tokens.
        ids: Of the whole prompt, int64 [T].
        cache: Slots of the prompt, of which those of the plan's rows are written.
        features: Of all images.
        kept: See `run_at_slots`.
        taps: Shown the outputs of the layers, of the last one only for the tokens that they keep.

    Returns:
        Hidden state of the prompt's last token behind the final norm, [1, hidden]; [0, hidden] where the plan stops
        short of it, since nothing but keys and values is wanted then.
    """
    language, config, rows = model.language, model.config.text, plan.rows
    x = embedding(ids[rows.slots], language.embed_tokens.weight)
    x = x.index_copy(0, rows.image_rows, features.embeds[rows.image_tokens])
    count = len(rows.slots)
    kept_rows = 1 if taps is None else taps.last or count
    wanted = min(count, kept_rows) if rows.last else 0
    # Everything in front of a token's slot is seen. Of a whole prompt that is a triangle, which needs no limits.
    visible, visible_last = up_to(rows.slots + 1), up_to(rows.slots[count - wanted :] + 1)

    def attention(q: Tensor, keys: Tensor, values: Tensor, reader: nn.Module) -> Rows:
        if len(q) < count:
            return attend_for(reader, q, keys, values, visible_last)
        if rows.whole:
            return attend_causal(q, keys[:, :count], values[:, :count])
        return attend_for(reader, q, keys, values, visible)

    def deepstack(layer: int) -> tuple[Tensor, Tensor] | None:
        if layer >= len(features.deepstack):
            return None
        return rows.image_rows, features.deepstack[layer][rows.image_tokens]

    rotation = mrope_cos_sin(plan.positions[:, rows.slots], config, x.dtype)
    hidden = run_at_slots(
        language.layers,
        language.norm,
        x,
        rotation,
        rows.slots,
        cache,
        attention,
        kept,
        None if taps is None else taps.see,
        deepstack,
        wanted,
    )
    return hidden[-1:]
