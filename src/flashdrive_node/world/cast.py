"""Who is on the road besides the ego: a table of agents that scenarios fill in, on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashdrive_node.world.draws import Draws
from flashdrive_node.world.scene import Agents, Kind

#: Agents per scene, and times in the schedule of each.
AGENTS, TIMES = 12, 4

#: Length, width and height by kind, metres.
SIZES = {
    Kind.CAR: (4.6, 1.85, 1.5),
    Kind.TRUCK: (8.5, 2.4, 3.2),
    Kind.CYCLIST: (1.8, 0.6, 1.75),
    Kind.PEDESTRIAN: (0.5, 0.6, 1.75),
    Kind.CONE: (0.35, 0.35, 0.75),
}


class Cast:
    """Agents of S scenes while they are being chosen."""

    def __init__(self, draws: Draws):
        scenes = len(draws.keys)
        self.draws = draws
        self._columns: dict[str, NDArray[Any]] = {
            name: np.zeros((scenes, AGENTS))
            for name in (
                *("s0", "d0", "length", "width", "height", "d_target", "lateral_speed", "trigger_s"),
                *("kind", "direction", "straight_on", "nudge"),
            )
        }
        self._columns["brake"] = np.full((scenes, AGENTS), 2.0)
        self._columns["speeds"] = np.zeros((scenes, AGENTS, TIMES + 1))
        self._columns["times"] = np.full((scenes, AGENTS, TIMES), 1e6)
        self._columns["length"][:] = self._columns["width"][:] = self._columns["height"][:] = 0.1

    def put(
        self,
        where: NDArray[np.bool_],
        slot: int,
        kind: Kind | NDArray[np.int64],
        *,
        s: Any,
        d: Any,
        speed: Any = 0.0,
        direction: Any = 0,
        schedule: tuple[tuple[Any, Any], ...] = (),
        **columns: Any,
    ) -> None:
        """Put an agent into a slot of the scenes where a condition holds.

        Args:
            where: [S].
            slot: 0 .. AGENTS - 1.
            kind: One, or one per scene [S].
            s, d: Where its middle starts, metres; a number or [S], as everything below.
            speed: At the start and wanted, m/s.
            direction: 1 along, -1 against, 0 across or standing.
            schedule: Pairs of a time and the speed wanted from then on.
            columns: Further fields of `Agents`.
        """
        kinds = np.broadcast_to(np.asarray(int(kind) if isinstance(kind, Kind) else kind), where.shape)
        for one, (length, width, height) in SIZES.items():
            rows = where & (kinds == int(one))
            for name, value in (("length", length), ("width", width), ("height", height)):
                self._columns[name][rows, slot] = value
        self._set("kind", where, slot, kinds)
        for name, value in {"s0": s, "d0": d, "direction": direction, "d_target": d, **columns}.items():
            self._set(name, where, slot, value)
        self._columns["speeds"][where, slot] = np.broadcast_to(np.asarray(speed, float), where.shape)[where, None]
        for i, (time, then) in enumerate(schedule):
            self._columns["times"][where, slot, i] = np.broadcast_to(np.asarray(time, float), where.shape)[where]
            later = np.broadcast_to(np.asarray(then, float), where.shape)[where, None]
            self._columns["speeds"][where, slot, i + 1 :] = later

    def _set(self, name: str, where: NDArray[np.bool_], slot: int, value: Any) -> None:
        self._columns[name][where, slot] = np.broadcast_to(np.asarray(value, float), where.shape)[where]

    def agents(self) -> Agents:
        """As tensors on the CPU."""
        tensors = {name: torch.from_numpy(column) for name, column in self._columns.items()}
        for name in ("kind", "direction"):
            tensors[name] = tensors[name].long()
        for name in ("straight_on", "nudge"):
            tensors[name] = tensors[name].bool()
        return Agents(**tensors, paint=torch.from_numpy(self.draws.integer("paint", 256, AGENTS)))
