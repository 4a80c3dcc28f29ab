"""The action expert's way in and out: noisy actions to embeddings, hidden states to velocities, both in float32."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.model.expert import ActionInProj


def embed_waypoints(x: Tensor, time_part: Tensor, projection: ActionInProj, dtype: torch.dtype) -> Tensor:
    """Waypoint embeddings, as `ActionInProj.embed` gives them.

    Args:
        x: Noisy actions, float32 [N, channels], contiguous.
        time_part: Of `ActionInProj.time_part` for the flow time of all of them, float32 [1, hidden].
        projection: The weights.
        dtype: Of the result.

    Returns:
        [N, out_size], summed in float32 and rounded once.
    """
    channels, hidden = len(projection.frequencies) - 1, cast(nn.Linear, projection.linears[0]).out_features
    if x.shape[1:] != (channels,) or time_part.shape != (1, hidden) or not x.dtype == time_part.dtype == torch.float32:
        raise ValueError(
            f"waypoints: float32 x [N, {channels}] and time_part [1, {hidden}] are required, found {list(x.shape)} "
            f"{x.dtype} and {list(time_part.shape)} {time_part.dtype}"
        )
    if uses_triton(x, dtype) and x.is_contiguous():
        from flashdrive_node.engine.kernels.triton_waypoints import embed_waypoints as run

        return run(x, time_part, projection, dtype)
    return projection.embed(x, time_part).to(dtype)


def project_velocity(hidden: Tensor, layer: nn.Linear) -> Tensor:
    """Velocities of waypoints: hidden states [N, hidden] in the model's type -> float32 [N, channels].

    Args:
        hidden: Behind the expert's final norm.
        layer: The float32 projection out.
    """
    if hidden.ndim != 2 or hidden.shape[1] != layer.in_features or hidden.stride(1) != 1:
        raise ValueError(f"waypoints: hidden states [N, {layer.in_features}] are required, found {list(hidden.shape)}")
    if uses_triton(hidden):
        from flashdrive_node.engine.kernels.triton_waypoints import project_velocity as run

        return run(hidden, layer.weight, layer.bias)
    return linear(hidden.float(), layer.weight, layer.bias)
