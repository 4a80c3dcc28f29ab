"""Which steps of the action flow are evaluated by the network, and what the others take in its place.

The state between two evaluations moves by a fixed combination of the last two velocities. So a schedule is a table
with one row per evaluation, and one captured computation serves every schedule of as many evaluations.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.flow_matching import Velocity

#: What a step without evaluation takes: the last velocity, or the line through the last two. (Before the second
#: evaluation there is no line, and the last velocity is held.)
Fill = Literal["hold", "linear"]


@dataclass(frozen=True)
class FlowSchedule:
    """Euler steps from t = 0 (noise) to t = 1 (action), some of them without the network."""

    #: Ends of the steps, ascending from 0 to 1; one more than there are steps.
    times: tuple[float, ...]
    #: Steps at whose start the network is evaluated, ascending; the first is 0.
    evaluated: tuple[int, ...]
    fill: Fill = "hold"

    def __post_init__(self) -> None:
        t, e = self.times, self.evaluated
        problems = []
        if len(t) < 2 or t[0] != 0 or t[-1] != 1 or any(not b > a for a, b in itertools.pairwise(t)):
            problems.append(f"times must ascend from 0 to 1, found {list(t)}")
        if not e or e[0] != 0 or any(b <= a for a, b in itertools.pairwise(e)) or e[-1] > len(t) - 2:
            problems.append(f"evaluated steps must start with 0, ascend and stay below {len(t) - 1}, found {list(e)}")
        if self.fill not in get_args(Fill):
            problems.append(f"fill must be one of {list(get_args(Fill))}, found {self.fill!r}")
        if problems:
            raise InputError("flow schedule: " + "; ".join(problems))

    @property
    def steps(self) -> int:
        """Number of Euler steps."""
        return len(self.times) - 1

    @classmethod
    def uniform(cls, steps: int, evaluated: tuple[int, ...] | None = None, fill: Fill = "hold") -> FlowSchedule:
        """Equal steps; every one of them evaluated by default, which is the plain integration.

        Raises:
            InputError: Fewer than one step, or evaluated steps that do not fit.
        """
        if steps < 1:
            raise InputError(f"flow schedule: at least 1 step is required, found {steps}")
        # The plain loop's own float32 grid, so that the full schedule is that loop to the last bit.
        times = torch.linspace(0.0, 1.0, steps + 1).tolist()
        return cls(tuple(times), tuple(range(steps)) if evaluated is None else evaluated, fill)

    @classmethod
    def parse(cls, text: str) -> FlowSchedule:
        """A schedule from a setting: ``"10"``, ``"8:0,1,2,7"`` or ``"8:0,1,2,7:linear"`` (steps, evaluated, fill).

        In place of a number of steps their ends may stand, separated by commas: ``"0,0.1,0.3,1:0,1"``.

        Raises:
            InputError: The text is nothing of the kind.
        """
        head, _, rest = text.partition(":")
        chosen, _, fill = rest.partition(":")
        try:
            evaluated = tuple(int(i) for i in chosen.split(",")) if chosen else None
            if "," not in head:
                return cls.uniform(int(head), evaluated, fill or "hold")  # type: ignore[arg-type]
            times = tuple(float(t) for t in head.split(","))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"flow schedule: 'STEPS:EVALUATED:FILL' is required, found {text!r}") from error
        every = tuple(range(len(times) - 1))
        return cls(times, every if evaluated is None else evaluated, fill or "hold")  # type: ignore[arg-type]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """What `integrate` reads: per evaluation the time and the weights of this and the last velocity, [K, 3]."""
        t, rows = self.times, []
        for k, first in enumerate(self.evaluated):
            end = self.evaluated[k + 1] if k + 1 < len(self.evaluated) else self.steps
            last_weight = t[end] - t[first]
            line_weight = 0.0
            if self.fill == "linear" and k > 0:
                spacing = t[first] - t[self.evaluated[k - 1]]
                line_weight = sum((t[i + 1] - t[i]) * (t[i] - t[first]) for i in range(first, end)) / spacing
            rows.append((t[first], last_weight + line_weight, -line_weight))
        return torch.tensor(rows, dtype=torch.float32, device=device)


#: The two schedules that were published with recorded accuracy (FlashDrive): 4 of 8 and 5 of 10 evaluations.
PUBLISHED_8 = FlowSchedule.uniform(8, (0, 1, 2, 7))
PUBLISHED_10 = FlowSchedule.uniform(10, (0, 2, 4, 6, 8))


class Flowed(NamedTuple):
    """The end of an integration."""

    #: Normalised actions, float32, of the noise's shape.
    action: Tensor
    #: Root mean square difference of the last two evaluated velocities, float32 [rows]: what a held velocity may be
    #: wrong by. NaN after a single evaluation.
    error: Tensor


def integrate(velocity: Velocity, noise: Tensor, table: Tensor, times: Tensor | None = None) -> Flowed:
    """Follow the flow, evaluating the network once per row of the table.

    Args:
        velocity: The network, guided or not; gives float32.
        noise: Starting point, float32 [rows, ...], already scaled.
        table: Of `FlowSchedule.table`, on noise's device.
        times: What the network is told of each evaluation's time, [K, ...], where that is not the time itself.
    """
    x, velocities = noise, []
    for (weight, last_weight), time in zip(table[:, 1:], table[:, 0] if times is None else times, strict=True):
        velocities.append(velocity(x, time))
        x = x + weight * velocities[-1]
        if len(velocities) > 1:
            x = x + last_weight * velocities[-2]
    if len(velocities) == 1:
        return Flowed(x, torch.full(noise.shape[:1], torch.nan, device=noise.device))
    return Flowed(x, (velocities[-1] - velocities[-2]).square().flatten(1).mean(dim=1).sqrt())


def best_schedule(
    velocities: Tensor, evaluations: int, times: tuple[float, ...] | None = None, fill: Fill = "hold"
) -> tuple[FlowSchedule, float]:
    """The schedule of K evaluations that departs least from recorded, fully evaluated integrations.

    Between two evaluations the state is displaced by the sum of what each step's velocity lacks. The cost of a schedule
    is the sum of these displacements (root mean square over recordings and actions), a bound on the displacement of the
    final action as long as the velocity field itself is not changed by it. It adds up over the gaps, so dynamic
    programming over the last two evaluations finds the least exactly, in O(K N^3).

    Args:
        velocities: Recorded at every step, [recordings, steps, ...].
        evaluations: K.
        times: Ends of the steps; equal steps by default.
        fill: What the other steps take.

    Returns:
        The schedule and its cost, in normalised action units.

    Raises:
        InputError: K does not fit the number of steps, or there is nothing recorded.
    """
    if velocities.ndim < 2 or not velocities.numel():
        raise InputError(f"velocities [recordings, steps, ...] are required, found {list(velocities.shape)}")
    steps = velocities.shape[1]
    if not 1 <= evaluations <= steps:
        raise InputError(f"evaluations must be 1 to {steps}, the steps recorded, found {evaluations}")
    t = FlowSchedule.uniform(steps).times if times is None else times
    if len(t) != steps + 1:
        raise InputError(f"times: {steps + 1} are required for {steps} steps, found {len(t)}")
    v = velocities.double().flatten(2)  # [recordings, steps, actions]
    dt = torch.tensor(t, dtype=torch.float64).diff()
    ends = torch.cat((torch.zeros_like(v[:, :1]), (dt[:, None] * v).cumsum(dim=1)), dim=1)

    def gap(before: int | None, first: int, end: int) -> float:
        filled = (t[end] - t[first]) * v[:, first]
        if fill == "linear" and before is not None:
            slope = (v[:, first] - v[:, before]) / (t[first] - t[before])
            filled = filled + slope * sum((t[i + 1] - t[i]) * (t[i] - t[first]) for i in range(first, end))
        return float((ends[:, end] - ends[:, first] - filled).square().mean().sqrt())

    # Least cost of everything in front of `first`, by the last two evaluations (before, first).
    reached: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {(None, 0): (0.0, (0,))}
    for _ in range(evaluations - 1):
        following: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {}
        for (before, first), (cost, chosen) in reached.items():
            for end in range(first + 1, steps):
                total = cost + gap(before, first, end)
                key = (first if fill == "linear" else None, end)
                if key not in following or total < following[key][0]:
                    following[key] = (total, (*chosen, end))
        reached = following
    finished = ((cost + gap(b, first, steps), chosen) for (b, first), (cost, chosen) in reached.items())
    cost, chosen = min(finished)
    return FlowSchedule(tuple(t), chosen, fill), cost
