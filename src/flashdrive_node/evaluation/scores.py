"""Scores of drives in the world: what went wrong, how far, how comfortably; one row per scene.

The scene score is AlpaSim's: 0 after an at-fault collision or off the road, else the progress relative to the expert on
the same scene, at most 1. At fault are collisions with the front, with a pedestrian, and with the side while the ego's
body leaves its lane; being hit from behind or while standing is not. Vehicles of the world drive on through each other
after a collision, so only the first collision of a drive counts.

Comfort is the share of time within nuPlan's bounds (comfort metric of its closed-loop planning challenge).
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.world.faults import contacts, faults, out_of_lane
from flashdrive_node.world.scene import DT_S, Scene
from flashdrive_node.world.state import State

#: Longitudinal acceleration, its change, and lateral acceleration of a comfortable drive: m/s^2, m/s^3, m/s^2.
ACCEL_RANGE, JERK_MAX, LATERAL_ACCEL_MAX = (-4.05, 2.40), 4.13, 4.89
#: Steps over which the jerk is taken; from one step to the next it would be mostly noise.
_JERK_STEPS = 5
#: Below this the expert's own drive is no measure of progress, metres.
_PROGRESS_MIN_M = 5.0


class Scores(NamedTuple):
    """Figures of S drives, [S] each; bool unless said otherwise."""

    front_collision: Tensor
    #: With a cause other than the ego's front.
    other_collision: Tensor
    pedestrian: Tensor
    at_fault_collision: Tensor
    off_road: Tensor
    red_light: Tensor
    #: Crossed a stop line without having stopped.
    stop_sign: Tensor
    #: Along the road, metres.
    distance_m: Tensor
    #: Share of time, 0 .. 1.
    comfort: Tensor

    def progress(self, expert: Scores) -> Tensor:
        """Distance relative to the expert's on the same scenes, at most 1; 1 where the expert hardly moved: [S]."""
        share = (self.distance_m / expert.distance_m.clamp(min=_PROGRESS_MIN_M)).clamp(0, 1)
        return torch.where(expert.distance_m < _PROGRESS_MIN_M, torch.ones_like(share), share)

    def scene_score(self, expert: Scores) -> Tensor:
        """AlpaSim's score: 0 on an at-fault collision or off the road, else the progress: [S], 0 .. 1."""
        failed = self.at_fault_collision | self.off_road
        return torch.where(failed, 0.0, self.progress(expert))


class Tally:
    """Adds up the scores of S drives step by step."""

    def __init__(self, scene: Scene, start: State):
        """Begin at a state; what was before does not count."""
        self.scene = scene
        no = torch.zeros(len(scene), dtype=torch.bool, device=scene.device)
        self._start_s, self._end_s = start.s, start.s
        self._front = self._other = self._pedestrian = self._at_fault = no
        self._off_road = self._red_light = self._stop_sign = no
        self._comfortable = torch.zeros_like(start.s)
        self._steps = 0
        self._accels: deque[Tensor] = deque([start.accel], maxlen=_JERK_STEPS + 1)

    def add(self, before: State, after: State) -> None:
        """Count one step of all drives."""
        touched = contacts(self.scene, after)
        wrong = faults(self.scene, before, after, touched)
        first = ~(self._front | self._other | self._pedestrian)
        swerved = touched.side & out_of_lane(self.scene, after)
        self._at_fault = self._at_fault | (first & (touched.front | touched.pedestrian | swerved))
        self._front = self._front | (first & wrong.front_collision)
        self._other = self._other | (first & wrong.other_collision)
        self._pedestrian = self._pedestrian | (first & wrong.pedestrian)
        self._off_road = self._off_road | wrong.off_road
        self._red_light = self._red_light | wrong.red_light
        self._stop_sign = self._stop_sign | wrong.stop_sign
        self._comfortable = self._comfortable + self._is_comfortable(before, after)
        self._end_s = after.s
        self._steps += 1

    def _is_comfortable(self, before: State, after: State) -> Tensor:
        self._accels.append(after.accel)
        span_s = DT_S * max(len(self._accels) - 1, 1)
        jerk = (self._accels[-1] - self._accels[0]).abs() / span_s
        sideways = (after.yaw - before.yaw).abs() / DT_S * after.speed
        low, high = ACCEL_RANGE
        calm = (after.accel > low) & (after.accel < high) & (sideways < LATERAL_ACCEL_MAX)
        # A full span only: at the start two neighbouring values would decide.
        return calm & ((jerk < JERK_MAX) | (len(self._accels) <= _JERK_STEPS))

    def scores(self) -> Scores:
        """So far."""
        return Scores(
            front_collision=self._front,
            other_collision=self._other,
            pedestrian=self._pedestrian,
            at_fault_collision=self._at_fault,
            off_road=self._off_road,
            red_light=self._red_light,
            stop_sign=self._stop_sign,
            distance_m=self._end_s - self._start_s,
            comfort=self._comfortable / max(self._steps, 1),
        )
