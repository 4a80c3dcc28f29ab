"""Finds the flow schedule of K evaluations that departs least from the full one, on the windows of a checkpoint's use.

One half of the windows is integrated in full, and schedules are searched in what was recorded there. The other half
says how far the candidates' paths are from those of the full schedule, from the same noise and texts.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flashdrive_node.engine.flow_schedule import PUBLISHED_8, PUBLISHED_10, Fill, FlowSchedule, best_schedule
from flashdrive_node.evaluation.clip import ClipSource, Window
from flashdrive_node.evaluation.flow_probe import FlowProbe, WindowFlow, relative_change
from flashdrive_node.evaluation.metrics import Estimate, bootstrap_mean, displacements
from flashdrive_node.model.errors import InputError

#: Where in the distribution over windows the curve of the velocity's change is given.
QUANTILES = (0.1, 0.5, 0.9)
#: What steps without an evaluation can take, in words.
FILLS: dict[Fill, str] = {"hold": "held", "linear": "linear"}
#: Schedules that are tried one by one.
_MOST_TRIED = 20_000


@dataclass(frozen=True)
class SearchSettings:
    """What is searched, and in what."""

    #: Evaluations of the schedule that is wanted.
    evaluations: int = 4
    #: Numbers of equal steps that evaluations are chosen from.
    steps: tuple[int, ...] = (8, 10)
    #: Windows at most; every second one for the search, the others for the scores.
    limit: int = 100
    #: Every so-manieth window of a clip: neighbours resemble each other.
    stride: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.evaluations < 1 or not self.steps or min(self.steps) < self.evaluations:
            problems.append(
                f"evaluations from 1 to the number of steps are required, found {self.evaluations} of {self.steps}"
            )
        if self.limit < 2 or self.stride < 1:
            problems.append(f"2 windows and a stride of 1 or more are required, found {self.limit} and {self.stride}")
        if problems:
            raise InputError("schedule search: " + "; ".join(problems))


@dataclass(frozen=True)
class Score:
    """A schedule, measured on windows that it was not searched on. Distances in metres, means over clips."""

    name: str
    #: As the setting ``flow_schedule`` takes it.
    schedule: str
    evaluations: int
    #: From the paths of the full schedule: over all points, and at the last one.
    deviation_m: Estimate
    end_deviation_m: Estimate
    #: From what was driven, and how much more that is than with the full schedule; None where it is not known.
    ade_m: Estimate | None
    ade_difference_m: Estimate | None


@dataclass
class SearchResult:
    """What a search found."""

    source: str
    settings: SearchSettings
    searched: int
    scored: int
    #: Of the full schedule that all others are compared with: the checkpoint's own number of steps.
    reference: str
    #: By number of steps: relative change of the velocity from step to step, [steps - 1, quantiles].
    velocity_change: dict[int, list[list[float]]]
    scores: list[Score]
    #: What the source says of its clips.
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Score:
        """The least deviation among the schedules of K evaluations, on the windows that all are scored on."""
        return min(
            (s for s in self.scores if s.evaluations == self.settings.evaluations), key=lambda s: s.deviation_m.mean
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        scores = [
            {k: v._asdict() if isinstance(v, Estimate) else v for k, v in vars(score).items()} for score in self.scores
        ]
        return {**vars(self), "settings": vars(self.settings), "scores": scores, "best": self.best.schedule}


def search(probe: FlowProbe, source: ClipSource, settings: SearchSettings) -> SearchResult:
    """Search on one half of a source's windows, and score on the other.

    Raises:
        InputError: Fewer than two windows.
        ModelError, ClipError: A window cannot be used.
    """
    notes: dict[str, list[str]] = {}
    with tqdm(total=settings.limit, desc="full integrations", unit="window") as bar:
        recorded: dict[int, list[Tensor]] = defaultdict(list)
        for _, flow in _flows(probe, source, settings, 0, notes, bar):
            for steps in settings.steps:
                recorded[steps].append(flow.velocities(steps))
        if not recorded:
            raise InputError(f"{source.name}: 2 windows are required, found none; {_noted(notes) or 'no notes'}")
        velocities = {steps: torch.cat(parts) for steps, parts in recorded.items()}
        own_steps = probe.loaded.model.config.flow.num_inference_steps
        named = candidates(velocities, settings.evaluations, own_steps)
        bar.set_description("candidates")
        distances = _Distances(list(named.values()))
        for (clip, window), flow in _flows(probe, source, settings, 1, notes, bar):
            distances.add(clip, window, flow)
        bar.total = bar.n  # the limit may be more than there is
    if not distances.windows:
        raise InputError(f"{source.name}: 2 windows are required, found 1; {_noted(notes) or 'no notes'}")
    return SearchResult(
        source=source.name,
        settings=settings,
        searched=len(recorded[settings.steps[0]]),
        scored=distances.windows,
        reference=schedule_text(FlowSchedule.uniform(own_steps)),
        velocity_change={steps: velocity_change(v).tolist() for steps, v in velocities.items()},
        scores=[distances.score(i, name) for i, name in enumerate(named)],
        notes=_noted(notes),
    )


def candidates(velocities: dict[int, Tensor], evaluations: int, own_steps: int) -> dict[str, FlowSchedule]:
    """Schedules worth a comparison, by name, each flow once; the first is the checkpoint's own full one.

    Args:
        velocities: By number of steps, [recordings, steps, waypoints, 2].
        evaluations: K.
        own_steps: The checkpoint's number of steps.
    """
    named = {f"all of {own_steps}": FlowSchedule.uniform(own_steps)}
    named |= {f"all of {steps}": FlowSchedule.uniform(steps) for steps in velocities}
    named |= {"published, 8 steps": PUBLISHED_8, "published, 10 steps": PUBLISHED_10}
    named[f"{evaluations} equal steps"] = FlowSchedule.uniform(evaluations)
    for steps, recorded in velocities.items():
        spread = tuple(i * steps // evaluations for i in range(evaluations))
        named[f"evenly, of {steps}"] = FlowSchedule.uniform(steps, spread)
        for fill, word in FILLS.items():
            found = shortlist(recorded, evaluations, fill)
            named |= {f"search of {steps}, {word}, {place}": s for place, s in enumerate(found, start=1)}
            named[f"least bound of {steps}, {word}"] = best_schedule(recorded, evaluations, fill=fill)[0]
    different: dict[object, str] = {}
    for name, schedule in named.items():
        # Holding every velocity for two of eight steps is taking four steps.
        different.setdefault(tuple(schedule.table().flatten().mul(1e6).round().tolist()), name)
    return {name: named[name] for name in different.values()}


def shortlist(velocities: Tensor, evaluations: int, fill: Fill, count: int = 3) -> list[FlowSchedule]:
    """The schedules whose final action would depart least if the velocities stayed as they were recorded.

    Unlike the bound of `best_schedule` this lets the gaps of a schedule make up for each other. All schedules are
    tried, unless they are too many: then there are none.

    Args:
        velocities: At equal steps, [recordings, steps, ...].
        evaluations: K.
        fill: What the other steps take.
        count: How many are wanted at most.
    """
    steps = velocities.shape[1]
    if math.comb(steps - 1, evaluations - 1) > _MOST_TRIED:
        return []
    tried = [
        FlowSchedule.uniform(steps, (0, *chosen), fill)
        for chosen in itertools.combinations(range(1, steps), evaluations - 1)
    ]
    # How much more of each step's velocity a schedule takes than the full one does: [schedules, steps].
    surplus = torch.full((len(tried), steps), -1.0 / steps, dtype=torch.float64)
    for row, schedule in zip(surplus, tried, strict=True):
        weights = schedule.table().double()
        row[list(schedule.evaluated)] += weights[:, 1]
        row[list(schedule.evaluated[:-1])] += weights[1:, 2]
    v = velocities.double().flatten(2).transpose(0, 1).flatten(1)  # [steps, recordings * actions]
    products = v @ v.T / v.shape[1]
    cost = ((surplus @ products) * surplus).sum(dim=1)
    return [tried[i] for i in cost.argsort(stable=True)[:count].tolist()]


def schedule_text(schedule: FlowSchedule) -> str:
    """A schedule of equal steps as `FlowSchedule.parse` takes it."""
    if len(schedule.evaluated) == schedule.steps:
        return str(schedule.steps)
    text = f"{schedule.steps}:{','.join(map(str, schedule.evaluated))}"
    return text if schedule.fill == "hold" else f"{text}:{schedule.fill}"


def velocity_change(velocities: Tensor) -> Tensor:
    """How much the velocity changes from each step to the next, relative to its size over the whole flow.

    Args:
        velocities: [recordings, steps, ...].

    Returns:
        `QUANTILES` over the recordings, float64 [steps - 1, quantiles].
    """
    return relative_change(velocities).quantile(torch.tensor(QUANTILES, dtype=torch.float64), dim=0).T


def _flows(
    probe: FlowProbe, source: ClipSource, settings: SearchSettings, half: int, notes: dict[str, list[str]], bar: Any
) -> Iterator[tuple[tuple[str, Window], WindowFlow]]:
    """Every second of the chosen windows, from the first or the second on."""
    chosen = 0
    for clip in source.clips():
        notes[clip.name] = clip.notes
        for number, window in zip(itertools.count(0, settings.stride), clip.every(settings.stride), strict=False):
            if chosen == settings.limit:
                return
            if chosen % 2 == half:
                seed = zlib.crc32(f"{settings.seed} {clip.name} {number}".encode())
                yield (clip.name, window), probe.window(window.observation, seed)
                bar.update()
            chosen += 1
        if chosen == settings.limit:
            return


def _noted(notes: dict[str, list[str]]) -> list[str]:
    return [f"{clip}: {note}" for clip, clip_notes in notes.items() for note in clip_notes]


class _Distances:
    """Collects per clip how far candidates' paths are from the first one's, and from what was driven."""

    def __init__(self, schedules: Sequence[FlowSchedule]):
        self.schedules = schedules
        self.windows = 0
        # Per clip: rows of [candidates], one per window.
        self.mean: dict[str, list[np.ndarray]] = defaultdict(list)
        self.end: dict[str, list[np.ndarray]] = defaultdict(list)
        self.ade: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, clip: str, window: Window, flow: WindowFlow) -> None:
        """Integrate a window under all schedules."""
        paths = np.stack([flow.path(schedule).numpy() for schedule in self.schedules])  # [candidates, samples, N, 3]
        apart = np.linalg.norm((paths - paths[:1])[..., :2], axis=-1)
        self.windows += 1
        self.mean[clip].append(apart.mean(axis=(1, 2)))
        self.end[clip].append(apart[..., -1].mean(axis=1))
        if window.truth is not None:
            truth = np.broadcast_to(window.truth.xyz, (len(paths), *window.truth.xyz.shape))
            self.ade[clip].append(displacements(paths, truth).mean(axis=(1, 2)))

    def score(self, index: int, name: str) -> Score:
        """Of one candidate."""
        schedule = self.schedules[index]

        def over_clips(rows: dict[str, list[np.ndarray]], minus_reference: bool = False) -> Estimate:
            values = [np.mean([row[index] - minus_reference * row[0] for row in clip]) for clip in rows.values()]
            return bootstrap_mean(np.array(values))

        return Score(
            name,
            schedule_text(schedule),
            len(schedule.evaluated),
            over_clips(self.mean),
            over_clips(self.end),
            over_clips(self.ade) if self.ade else None,
            over_clips(self.ade, minus_reference=True) if self.ade else None,
        )
