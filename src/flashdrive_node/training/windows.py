"""Windows to train on: moments of drives with what the expert does next, before anything is rendered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flashdrive_node.world.expert import Cause
from flashdrive_node.world.reasoning import Pace, Reason, Start
from flashdrive_node.world.scene import Kind, Scene
from flashdrive_node.world.state import State
from flashdrive_node.world.steering import Manoeuvre

_Tree = TypeVar("_Tree")

#: Fields of a `Reason` that a sentence tells, and how many values each has.
DECISION_FIELDS = {"cause": len(Cause), "pace": len(Pace), "manoeuvre": len(Manoeuvre), "start": len(Start)}
#: What `geometry` measures.
GEOMETRY = ("lateral", "heading", "bend at 5 m", "bend at 15 m", "bend at 30 m", "lead gap", "lead speed", "stop line")
_BENDS_M = (5.0, 15.0, 30.0)


@dataclass(frozen=True)
class Windows:
    """N windows."""

    scene: Scene
    #: Moments of the frames, oldest first; the last is t0.
    frames: tuple[State, ...]
    #: float32 [N, 16, 3] and [N, 16, 3, 3], in the vehicle frame at t0.
    history_xyz: Tensor
    history_rot: Tensor
    #: What the expert does from t0 on: acceleration and curvature, float32 [N, 64, 2], m/s^2 and 1/m.
    actions: Tensor
    #: `DECISION_FIELDS` of the expert's reason, int64 [N, 4].
    decision: Tensor
    #: Of `geometry`, float32 [N, 8] each.
    geometry: Tensor
    geometry_known: Tensor
    sentences: tuple[str, ...]
    navigation: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.sentences)

    def rows(self, index: Tensor) -> Windows:
        """Windows at these rows: int64 [n] on the tensors' device."""
        chosen = index.tolist()
        return replace(
            map_leaves(self, lambda t: t[index]),
            sentences=tuple(self.sentences[i] for i in chosen),
            navigation=tuple(self.navigation[i] for i in chosen),
        )

    def span(self, first: int, last: int) -> Windows:
        """The windows from one to before another, sharing memory."""
        return replace(
            map_leaves(self, lambda t: t[first:last]),
            sentences=self.sentences[first:last],
            navigation=self.navigation[first:last],
        )

    def to(self, device: torch.device | str) -> Windows:
        """On another device."""
        return map_leaves(self, lambda t: t.to(device, non_blocking=True))


def map_leaves(tree: _Tree, function: Callable[[Any], Any]) -> _Tree:
    """Apply a function to every tensor or array in nested dataclasses and tuples; texts stay as they are."""
    node: Any = tree
    if is_dataclass(node):
        values = {f.name: map_leaves(getattr(node, f.name), function) for f in fields(node)}
        return cast(_Tree, cast(Any, type(node))(**values))
    if isinstance(node, tuple):
        return cast(_Tree, tuple(map_leaves(one, function) for one in node))
    return cast(_Tree, node if node is None or isinstance(node, str) else function(node))


def join(*trees: _Tree) -> _Tree:
    """Windows, scenes or states one behind the other."""
    nodes: tuple[Any, ...] = trees
    first = nodes[0]
    if isinstance(first, Tensor):
        return cast(_Tree, torch.cat(nodes))
    names = [f.name for f in fields(first)]
    values = {}
    for name in names:
        column = [getattr(node, name) for node in nodes]
        if name in ("sentences", "navigation"):
            values[name] = tuple(text for texts in column for text in texts)
        elif name == "frames":
            values[name] = tuple(join(*states) for states in zip(*column, strict=True))
        else:
            values[name] = join(*column)
    return cast(_Tree, type(first)(**values))


def decision_of(reason: Reason) -> Tensor:
    """`DECISION_FIELDS` of a reason: int64 [N, 4]."""
    return torch.stack([getattr(reason, name).long() for name in DECISION_FIELDS], dim=1)


def geometry(scene: Scene, state: State) -> tuple[Tensor, Tensor]:
    """Where the ego is in the road, and what is ahead: auxiliary targets of about unit size.

    Returns:
        Values and whether they are known, float32 [N, 8] each, see `GEOMETRY`: offset from the lane's centre (m),
        heading to the road (0.1 rad), curvature of the road ahead (1/30 m), logarithms of the gap to the vehicle ahead
        and of the distance to the stop line (m), speed of the vehicle ahead (10 m/s).
    """
    agents = scene.agents
    road_yaw = scene.road.pose_at(state.s[:, None], torch.zeros_like(state.s)[:, None])[2][:, 0]
    heading = state.yaw - road_yaw
    heading = torch.atan2(heading.sin(), heading.cos())
    bends = [scene.road.curvature_at(state.s[:, None] + ahead)[:, 0] for ahead in _BENDS_M]
    gap = state.agent_s - 0.5 * agents.length - state.front_s[:, None]
    vehicle = (agents.kind != int(Kind.NOTHING)) & (agents.kind != int(Kind.PEDESTRIAN)) & (agents.direction >= 0)
    ahead = vehicle & (gap > -1.0) & (gap < 60.0) & ((state.agent_d - state.d[:, None]).abs() < 1.75)
    nearest, who = torch.where(ahead, gap, torch.inf).min(dim=1)
    lead = ahead.any(dim=1)
    line = scene.stop_line_s - state.front_s
    near_line = (line > -1.0) & (line < 60.0)
    values = torch.stack(
        (
            state.d,
            10.0 * heading,
            *(30.0 * bend for bend in bends),
            torch.where(lead, nearest, 0.0).clamp(min=0).log1p(),
            0.1 * state.agent_speed.gather(1, who[:, None])[:, 0],
            torch.where(near_line, line, 0.0).clamp(min=0).log1p(),
        ),
        dim=1,
    )
    known = torch.ones_like(values, dtype=torch.bool)
    known[:, 5] = known[:, 6] = lead
    known[:, 7] = near_line
    return values.float(), known.float()
