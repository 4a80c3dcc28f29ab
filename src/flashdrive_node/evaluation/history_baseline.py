"""A driver without eyes: what the ego history and the navigation instruction alone say about the next 6.4 s.

Histories give much of a decision away, so every score of the model stands beside this one's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdrive_node.model.action_space import ActionSpace, yaw_of
from flashdrive_node.model.action_space import Path as DrivenPath
from flashdrive_node.model.config import ActionSpaceConfig
from flashdrive_node.model.errors import CheckpointError

#: Name of its file beside a trained checkpoint.
FILE_NAME = "history_baseline.safetensors"
_ROUTE_FEATURES = 4
#: Sizes of differences of positions (m) and headings (rad) per step.
_STEP_SCALE, _YAW_SCALE = 1.0, 0.05


class HistoryBaseline(nn.Module):
    """A multilayer perceptron from 16 poses and the navigation instruction to normalised actions."""

    def __init__(self, config: ActionSpaceConfig, poses: int = 16, hidden: int = 256):
        super().__init__()
        self.config, self.poses, self.hidden = config, poses, hidden
        self.space = ActionSpace(config)
        inputs = 3 * (poses - 1) + _ROUTE_FEATURES
        sizes = [inputs, hidden, hidden, hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(hidden, 2 * config.n_waypoints)

    def forward(self, history_xyz: Tensor, history_rot: Tensor, route: Tensor) -> Tensor:
        """Normalised actions [B, 64, 2].

        Args:
            history_xyz: Ego positions in the vehicle frame at t0, float32 [B, 16, 3], metres.
            history_rot: [B, 16, 3, 3].
            route: Of `route_features`, [B, 4].
        """
        steps = history_xyz.diff(dim=1)[..., :2] / _STEP_SCALE
        turns = yaw_of(history_rot).diff(dim=1) / _YAW_SCALE
        x = torch.cat((steps.flatten(1), turns, route), dim=1)
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return self.out(x).unflatten(1, (-1, 2))

    def plan(self, history_xyz: Tensor, history_rot: Tensor, navigation: Sequence[str | None]) -> DrivenPath:
        """The path that it drives: [B, 64, ...], vehicle frame at t0. Arguments as in `forward`."""
        route = route_features(navigation).to(history_xyz.device)
        action = self(history_xyz, history_rot, route)
        return self.space.to_path(action, self.space.initial_speed(history_xyz, history_rot))

    def loss(self, history_xyz: Tensor, history_rot: Tensor, route: Tensor, speed: Tensor, actions: Tensor) -> Tensor:
        """Mean distance to the path of these normalised actions, metres, and a little of the actions' own error.

        Args:
            history_xyz, history_rot, route: As in `forward`.
            speed: At t0, m/s [B].
            actions: Normalised, [B, 64, 2].
        """
        planned = self(history_xyz, history_rot, route)
        here, there = (self.space.to_path(a, speed).xyz for a in (planned, actions))
        distance = (here - there).square().sum(dim=-1).add(1e-4).sqrt().mean()
        return distance + 0.1 * (planned - actions).abs().mean()

    def save(self, path: Path) -> None:
        """Write weights and sizes."""
        described = {"poses": self.poses, "hidden": self.hidden, "action_space": vars(self.config)}
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, path, metadata={"history_baseline": json.dumps(described)})


def load_history_baseline(path: Path, device: torch.device | str = "cpu") -> HistoryBaseline:
    """Read what `HistoryBaseline.save` wrote.

    Raises:
        CheckpointError: Not such a file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            described = json.loads((file.metadata() or {})["history_baseline"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        space: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in described["action_space"].items()
        }
        baseline = HistoryBaseline(ActionSpaceConfig(**space), described["poses"], described["hidden"])
        baseline.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(str(path), [f"a history baseline of `flashdrive train vla` is required: {error}"]) from (
            error
        )
    return baseline.to(device).requires_grad_(False).eval()


def route_features(navigation: Sequence[str | None]) -> Tensor:
    """Navigation instructions in numbers: left, right, straight on, and nearness of the turn: float32 [B, 4]."""
    rows = []
    for text in navigation:
        words = (text or "").split()
        metres = float(words[-1][:-1]) if words and words[-1][:-1].isdigit() else 0.0
        near = 1.0 / (1.0 + metres / 20.0) if "Turn" in words else 0.0
        rows.append([float("left" in words), float("right" in words), float("straight" in words), near])
    return torch.tensor(rows).reshape(-1, _ROUTE_FEATURES)
