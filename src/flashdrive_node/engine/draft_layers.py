"""What a drafter's layers compute around attention: by the engine's kernels, or as modules where gradients count."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashdrive_node.engine.kernels.linear import gated_project, project, project_parts, skinny_linear
from flashdrive_node.engine.kernels.quantised_linear import add_norm_for, norm_for
from flashdrive_node.model.decoder import DecoderLayer


def last_outputs(first: int, layer: nn.Module, x: Tensor) -> Tensor:
    """Outputs of a linear layer from one on, of [texts, T, in]; a layer that has no plain weight is run as a whole."""
    if isinstance(layer, nn.Linear):
        weight = layer.weight[first:]
        return linear(x, weight) if _learns() else skinny_linear(x.flatten(0, 1), weight).unflatten(0, x.shape[:2])
    return product(x, layer)[..., first:]


def project_layer(layer: DecoderLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`DecoderLayer.project` of [texts, T, hidden], by the engine's kernels."""
    if _learns():
        return layer.project(x)
    rows = norm_for(layer.qkv, x.flatten(0, 1), layer.input_norm)
    qkv = project(rows, layer.qkv).unflatten(0, x.shape[:2])
    parts = qkv.split((layer.q_size, layer.kv_size, layer.kv_size), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, layer.head_dim)) for part in parts)
    return layer.q_norm(q), layer.k_norm(k), v


def finish_layer(layer: DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """`DecoderLayer.finish` of [texts, T, hidden], by the engine's kernels."""
    if _learns():
        return layer.finish(x, attended)
    flat, hidden = add_norm_for(
        layer.gate_up, x.flatten(0, 1), project_parts(attended.flatten(0, 1), layer.o_proj), layer.post_norm
    )
    update = project(gated_project(hidden, layer.gate_up, layer.down), layer.down)
    return (flat + update).view_as(x)


def product(x: Tensor, layer: nn.Module) -> Tensor:
    """Rows [texts, T, in] through a layer of whatever format."""
    if _learns():
        result: Tensor = layer(x)
        return result
    return project(x.flatten(0, 1), layer).unflatten(0, x.shape[:2])


def _learns() -> bool:
    """Whether gradients are wanted, which the engine's kernels have none of."""
    return torch.is_grad_enabled()
