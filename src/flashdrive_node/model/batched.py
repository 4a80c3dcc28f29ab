"""The stages of inference over B windows at once, for training and for driving many scenes in lock-step.

The modules are those of `inference`, which runs one window with several samples; here every row is a window of its own
with its own keys and values. All passes can be differentiated. Rows are padded on the right (see `prompt_batch`): the
prompt pass is causal and needs no mask, later passes hide what lies behind a row's end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, scaled_dot_product_attention

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.decoder import DecoderLayer, Observe
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.flow_matching import Velocity
from flashdrive_node.model.images import preprocess
from flashdrive_node.model.inference import Generated, StopRule, collect_generated, forbid
from flashdrive_node.model.rope import mrope_cos_sin, rotate
from flashdrive_node.model.sampling import SamplingSettings, sample
from flashdrive_node.model.vision import VisionFeatures

#: Given layer, queries [B, T, heads, head_dim], keys and values [B, T, kv_heads, head_dim]: [B, T, heads * head_dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass
class BatchContext:
    """Keys and values of B rows."""

    #: Per layer [B, kv_heads, S, head_dim].
    keys: list[Tensor]
    values: list[Tensor]
    #: Tokens of each row, int64 [B]; slots behind them are hidden.
    lengths: Tensor
    #: Position of a token behind the images minus its index, the same in all rows.
    rope_delta: int
    #: Tokens at each row's end that were never run, so that their slots are empty: a number or int64 [B].
    missing: Tensor | int = 0


def encode_images(model: Alpamayo, images: Tensor) -> VisionFeatures:
    """Vision features of B windows.

    Args:
        model: The network.
        images: uint8 [B, cameras, frames, H, W, 3], on the model's device, oldest frame first.

    Returns:
        Embeddings and DeepStack features [B, image tokens, text hidden].

    Raises:
        InputError: Not uint8, or of another shape.
    """
    if images.ndim != 6 or images.shape[5] != 3 or images.dtype != torch.uint8:
        raise InputError(
            "images: uint8 [windows, cameras, frames, height, width, 3] are required, found "
            f"{images.dtype} {list(images.shape)}"
        )
    pixels, grids = preprocess([images.flatten(0, 2)], model.config, model.device, model.dtype)
    features = model.vision.encode_run(pixels, grids[0], len(grids), None)
    rows = images.shape[0]
    return VisionFeatures(
        features.embeds.unflatten(0, (rows, -1)), [level.unflatten(0, (rows, -1)) for level in features.deepstack]
    )


def run_rows(
    layers: nn.ModuleList,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
    after_layer: Callable[[int, Tensor], Tensor] | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Run T tokens of B rows through a decoder stack.

    Args:
        layers: DecoderLayer modules.
        x: [B, T, hidden].
        cos, sin: Rotations, [T, head_dim] for all rows or [B * T, head_dim].
        attend: Attention of the rotated queries and keys; keeps keys and values where they are needed later.
        after_layer: Called as after_layer(i, x) -> x behind every layer (DeepStack).
        observe: Receives "layer_out.i".

    Returns:
        Hidden states before the final norm, [B, T, hidden].
    """

    def turn(t: Tensor) -> Tensor:
        if cos.shape[0] == t.shape[1]:
            return rotate(t, cos, sin)
        return rotate(t.flatten(0, 1), cos, sin).view_as(t)

    for i, module in enumerate(layers):
        layer = cast(DecoderLayer, module)
        q, k, v = layer.project(x)
        x = layer.finish(x, attend(i, turn(q), turn(k), v))
        if observe:
            observe(f"layer_out.{i}", x)
        if after_layer:
            x = after_layer(i, x)
    return x


def prefill(
    model: Alpamayo,
    ids: Tensor,
    positions: Tensor,
    features: VisionFeatures,
    image_index: Tensor,
    observe: Observe | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run prompts, and in training the texts behind them, through the language model.

    Args:
        model: The network.
        ids: int64 [B, T], padded on the right.
        positions: int64 [3, T].
        features: Of `encode_images`.
        image_index: Indices of the image tokens, int64 [image tokens].
        observe: See `run_rows`.

    Returns:
        Hidden states behind the final norm [B, T, hidden], and per layer keys and values [B, kv_heads, T, head_dim].
        Those of padding mean nothing.
    """
    language = model.language
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k.transpose(1, 2))
        values.append(v.transpose(1, 2))
        return attend_causal(q.transpose(1, 2), keys[-1], values[-1])

    def deepstack(layer: int, hidden: Tensor) -> Tensor:
        if layer >= len(features.deepstack):
            return hidden
        return hidden.index_add(1, image_index, features.deepstack[layer])

    x = embedding(ids, language.embed_tokens.weight).index_copy(1, image_index, features.embeds)
    cos, sin = mrope_cos_sin(positions, language.config, x.dtype)
    hidden = language.norm(run_rows(language.layers, x, cos, sin, attend, deepstack, observe))
    return hidden, keys, values


def last_hidden(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Hidden state of each row's last token: [B, T, hidden], int64 [B] -> [B, hidden]."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]


def decode(
    model: Alpamayo,
    context: BatchContext,
    logits: Tensor,
    settings: SamplingSettings,
    rule: StopRule,
    generator: torch.Generator | None = None,
) -> Generated:
    """Generate the text of every row, token by token; as `inference.decode`, each row on its own context.

    Args:
        model: The network.
        context: The prompts; it is extended in place, so that afterwards it holds prompts and texts.
        logits: Of the first tokens, float32 [B, vocabulary].
        settings: How tokens are drawn.
        rule: When a text ends.
        generator: Source of randomness on the model's device.
    """
    device, rows = logits.device, torch.arange(logits.shape[0], device=logits.device)
    prompts = context.lengths
    # Room for the text, and to a multiple of 16 for the sake of GPU kernels.
    slots = -(-(context.keys[0].shape[2] + settings.max_length) // 16) * 16
    for cache in (context.keys, context.values):
        cache[:] = [pad(t, (0, 0, 0, slots - t.shape[2])) for t in cache]
    column = torch.arange(slots, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    while True:
        token = sample(forbid(logits, rule), settings, generator)
        token = torch.where(finished, rule.pad, token)
        tokens.append(token)
        finished = finished | (token == rule.end_of_turn)
        if rule.stop is not None:
            finished = finished | (token == rule.stop)
        if len(tokens) == settings.max_length:
            break
        slot = prompts + len(tokens) - 1
        hidden = _step(model, context, token, rows, slot, column[None] <= slot[:, None])
        if bool(finished.all()):
            break
        logits = model.language.logits(hidden)
    text = collect_generated(torch.stack(tokens, dim=1), rule)
    lengths = torch.tensor(text.lengths, device=device)
    # As in the reference, the last token of a text that fills its room is not run.
    context.lengths, context.missing = prompts + lengths, (lengths == settings.max_length).long()
    return text


def _step(model: Alpamayo, context: BatchContext, token: Tensor, rows: Tensor, slot: Tensor, visible: Tensor) -> Tensor:
    """Run one token per row at its slot: hidden states [B, hidden]."""
    language = model.language
    x = embedding(token, language.embed_tokens.weight)[:, None]
    cos, sin = mrope_cos_sin((slot + context.rope_delta).expand(3, -1), language.config, x.dtype)
    mask = group_masks(visible[:, None], language.config.group_size, x.dtype)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context.keys[layer][rows, :, slot] = k[:, 0]
        context.values[layer][rows, :, slot] = v[:, 0]
        return attend_masked(q, context.keys[layer], context.values[layer], mask)

    return language.norm(run_rows(language.layers, x, cos, sin, attend))[:, 0]


def run_behind(
    model: Alpamayo,
    context: BatchContext,
    ids: Tensor,
    first: Tensor,
    write: bool = True,
    observe: Observe | None = None,
) -> Tensor:
    """Run some tokens of every row behind what stands in front of them in its context.

    Args:
        model: The network.
        context: Has slots for all of them.
        ids: int64 [B, T], tokens behind the images; those of padding come last and mean nothing.
        first: Slot of each row's first one, int64 [B].
        write: Put their keys and values there; else those that stand there already are theirs.
        observe: See `run_rows`.

    Returns:
        Hidden states behind the final norm, [B, T, hidden].
    """
    language, device = model.language, ids.device
    # A token in front of the context's first has no place; it is taken for the first, so that all is finite.
    slots = (first[:, None] + torch.arange(ids.shape[1], device=device)).clamp(min=0)
    x = embedding(ids, language.embed_tokens.weight)
    cos, sin = mrope_cos_sin((slots.flatten() + context.rope_delta).expand(3, -1), language.config, x.dtype)
    visible = torch.arange(context.keys[0].shape[2], device=device) <= slots[..., None]
    mask = group_masks(visible, language.config.group_size, x.dtype)
    rows = torch.arange(len(ids), device=device)[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if write:
            context.keys[layer][rows, :, slots] = k
            context.values[layer][rows, :, slots] = v
        return attend_masked(q, context.keys[layer], context.values[layer], mask)

    hidden: Tensor = language.norm(run_rows(language.layers, x, cos, sin, attend, None, observe))
    return hidden


def velocity_field(model: Alpamayo, context: BatchContext, samples: int) -> Velocity:
    """The expert on the contexts of B rows, for several noisy actions of each.

    The waypoints of a sample see their row's context up to its end, and each other. Their positions go on behind it.

    Args:
        model: The network.
        context: Prompts with their texts.
        samples: Noisy actions per row.

    Returns:
        Velocity on float32 [B, samples, waypoints, 2]; the flow time is a scalar or [B, samples].
    """
    config = model.config
    rows, waypoints = len(context.lengths), config.action_space.n_waypoints
    device, tokens = context.lengths.device, samples * config.action_space.n_waypoints
    order = torch.arange(waypoints, device=device)
    first = (context.lengths + context.rope_delta)[:, None, None]
    positions = (first + order).expand(-1, samples, -1).reshape(-1).expand(3, -1)
    cos, sin = mrope_cos_sin(positions, config.expert, model.dtype)

    slots = torch.arange(context.keys[0].shape[2], device=device)
    filled = context.lengths - context.missing
    known = (slots[None] < filled[:, None])[:, None].expand(-1, tokens, -1)
    sample_of = torch.arange(samples, device=device).repeat_interleave(waypoints)
    own = sample_of[:, None] == sample_of[None]
    if not config.expert_non_causal:
        own = own & (order.repeat(samples)[None] <= order.repeat(samples)[:, None])
    mask = torch.cat((known, own.expand(rows, -1, -1)), dim=2)
    mask = group_masks(mask, config.expert.group_size, model.dtype)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.cat((context.keys[layer], k.transpose(1, 2)), dim=2)
        values = torch.cat((context.values[layer], v.transpose(1, 2)), dim=2)
        return attend_masked(q, keys, values, mask)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        expert = model.expert
        times = t.expand(rows, samples)[..., None].expand(-1, -1, waypoints)
        y = expert.action_in_proj(x.flatten(0, 2), times.reshape(-1))
        y = y.to(model.dtype).view(rows, tokens, -1)
        y = expert.norm(run_rows(expert.layers, y, cos, sin, attend))
        return expert.action_out_proj(y.float()).view_as(x)

    return velocity


def attend_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: q [B, heads, T, head_dim], k and v [B, kv_heads, T, head_dim] -> [B, T, heads * head_dim]."""
    if q.device.type == "cpu":
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    grouped = k.shape[1] != q.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2).flatten(2)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of few queries to many keys, heads that share keys side by side as in `attention.attend`.

    Args:
        q: [B, T, heads, head_dim].
        k, v: [B, kv_heads, S, head_dim].
        mask: Of `group_masks`, [B, 1, group * T, S].

    Returns:
        [B, T, heads * head_dim].
    """
    rows, tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    q = q.view(rows, tokens, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.view(rows, kv_heads, -1, tokens, dim).permute(0, 3, 1, 2, 4).reshape(rows, tokens, heads * dim)


def group_masks(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """`attention.group_mask` row by row: bool [B, T, S] -> what is added to the scores, [B, 1, group * T, S]."""
    rows, tokens, slots = mask.shape
    added = torch.zeros(rows, group, tokens, -(-slots // 16) * 16, dtype=dtype, device=mask.device)
    added[..., :slots].masked_fill_(~mask[:, None], -torch.inf)
    return added.flatten(1, 2)[:, None, :, :slots]
