"""One scene of the world, driven by the driving node: what is sensed goes out, what is published is followed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from flashdrive_node.evaluation.closed_loop import ClosedLoop
from flashdrive_node.ros.driver_link import Answer, DriverError, DriverLink
from flashdrive_node.ros.picture_messages import Picture
from flashdrive_node.ros.published_plan import PlanError, PublishedPlan
from flashdrive_node.ros.world_clock import WorldClock
from flashdrive_node.ros.world_sensors import ODOMETRY_FRAME, WorldSensors
from flashdrive_node.world.frames import FRAMES
from flashdrive_node.world.scene import DT_S
from flashdrive_node.world.state import State
from flashdrive_node.world.tracking import MAX_AGE_S, from_vehicle, newest
from flashdrive_node.world.wording import navigation

DT_NS = round(DT_S * 1e9)
#: In real time the expert drives so many steps longer at most, while the first trajectory is being computed.
_GRACE_STEPS = 10
#: So many windows in a row without a word from the node end the run.
_TIMEOUTS = 3


@dataclass(frozen=True)
class DriveMode:
    """How the world and the driving node take turns."""

    #: The world goes on with the wall clock; else it waits for the answer to every window.
    real_time: bool = False
    #: Longest wait for an answer.
    answer_timeout_s: float = 30.0


@dataclass
class WindowLog:
    """What came of the windows of one scene."""

    #: Windows (in real time: steps) with a trajectory to drive, and those without a new one by reason.
    answered: int = 0
    unanswered: dict[str, int] = field(default_factory=dict)
    #: Answers to other pictures or another navigation text than this world had sent.
    other_inputs: int = 0
    #: Steps in which a trajectory was followed; in the others the expert drove or the vehicle braked.
    following: int = 0
    #: Reasonings that were driven by.
    texts: list[str] = field(default_factory=list)
    #: Age of the trajectory when it is driven, and the node's own time from image to trajectory, milliseconds.
    age_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    #: Wall time by which the running clock was stretched, because the world itself was late.
    late_s: float = 0.0


class SceneDrive:
    """Drives one scene by what the driving node publishes.

    Args:
        loop: One scene whose expert has driven until there is a history.
        link: To the driving node, which is ready.
        sensors, clock: Of the world.
        begin_ns: Time of the scene's first state.
        mode: How.

    Attributes:
        log: What came of the windows.
        now_ns: Time of the loop's newest state.
        pictures: Newest pictures RGB uint8 [H, W, 3] by camera index.
        record: ``~/output/record`` of the window that is driven by; empty before the first.
    """

    def __init__(
        self,
        loop: ClosedLoop,
        link: DriverLink,
        sensors: WorldSensors,
        clock: WorldClock,
        begin_ns: int,
        mode: DriveMode,
    ):
        self.loop, self.log = loop, WindowLog()
        self._link, self._sensors, self._clock, self._mode = link, sensors, clock, mode
        self._begin_ns = begin_ns
        self.now_ns = begin_ns + (len(loop.states) - 1) * DT_NS
        self.pictures: dict[int, Picture] = {}
        self.record: dict[str, Any] = {}
        #: Navigation texts by time, as far back as answers may reach.
        self._texts: dict[int, str | None] = {}
        self._held_t0_ns = -1
        self._timeouts = self._steps = 0

    def start(self) -> None:
        """Reset the node's stream, and send the odometry of the expert's drive, so that the first window has a history.

        Raises:
            DriverError: The node does not take part.
        """
        states = list(self.loop.states)
        if self._mode.real_time:
            self.loop.observe()  # makes the pictures of the last moments before time begins to run
            self._link.reset(self._clock.now_ns)
            self._clock.run_to(self._begin_ns)
        else:
            # In one leap, before anything is sent: the node forgets everything when its clock jumps by a second.
            self._clock.tell(self.now_ns)
            self._link.reset(self.now_ns)
        for number, (before, state) in enumerate(pairwise([states[0], *states[:-1]])):
            if self._mode.real_time:
                self._tell(self._begin_ns + number * DT_NS)
            self._send_odometry(self._begin_ns + number * DT_NS, before, state)

    def step(self) -> None:
        """One step of 0.1 s.

        Raises:
            DriverError: The node has gone, or says nothing any more.
        """
        self._tell(self.now_ns)
        if self._mode.real_time:
            # What comes while pictures are being made was not there when this step began.
            answer = self._link.newest(self._begin_ns)
            self._sense()
        else:
            self._sense()
            answer = self._link.answer(self.now_ns, self._mode.answer_timeout_s)
        self._take(answer)
        waiting = self._mode.real_time and self._held_t0_ns < 0 and self._steps < _GRACE_STEPS
        if waiting:
            self.loop.apply(None)
        else:
            self.log.following += int(self.loop.step().following)
        self._steps += 1
        self.now_ns += DT_NS

    def _tell(self, now_ns: int) -> None:
        if self._mode.real_time:
            self.log.late_s += self._clock.run_to(now_ns + DT_NS)
        else:
            self._clock.tell(now_ns)

    def _sense(self) -> None:
        """Send what the vehicle senses; odometry last, because it completes the window."""
        (text,) = navigation(self.loop.scene, self.loop.state)
        # Before the pictures are made, so that the node has long read it when the window is complete.
        self._sensors.send_navigation(text)
        images = self.loop.observe().images
        assert images is not None
        frames = images[0].cpu().numpy()  # [cameras, 4, H, W, 3]
        unsent = range(FRAMES - 1) if not self._steps else ()
        for place in (*unsent, FRAMES - 1):
            self.pictures = dict(zip(self._sensors.cameras, frames[:, place], strict=True))
            self._sensors.send_pictures(self.now_ns - (FRAMES - 1 - place) * DT_NS, self.pictures)
        self._texts[self.now_ns] = text if self._sensors.has_navigation else None
        self._texts.pop(self.now_ns - len(self.loop.states) * DT_NS, None)
        self._send_odometry(self.now_ns, self.loop.states[-2], self.loop.state)

    def _send_odometry(self, now_ns: int, before: State, state: State) -> None:
        yaw_rate = float(state.yaw - before.yaw) / DT_S
        self._sensors.send_odometry(now_ns, _pose(state), float(state.speed), yaw_rate)

    def _take(self, answer: Answer) -> None:
        """Follow the trajectory of an answer from now on, and note what came of the window."""
        age_ns = self.now_ns - answer.plan.t0_ns if answer.plan is not None else 0
        if answer.plan is None or age_ns >= MAX_AGE_S * 1e9:
            self._note_missing(answer)
            return
        self._timeouts = 0
        try:
            if answer.plan.t0_ns != self._held_t0_ns:
                self._follow(answer.plan)
        except PlanError as error:
            self._note_missing(Answer(None, problem=str(error)))
            return
        self.log.answered += 1
        self.log.age_ms.append(age_ns / 1e6)
        if answer.record is not None and answer.record is not self.record:
            self.record = answer.record
            self._note_record(answer.record)

    def _follow(self, plan: PublishedPlan) -> None:
        back, off_ns = divmod(self.now_ns - plan.t0_ns, DT_NS)
        if off_ns or not 0 <= back < len(self.loop.states):
            raise PlanError(f"a trajectory for the time of a recent picture is required, found t0 {plan.t0_ns} ns")
        start = self.loop.states[-1 - back]
        plan = plan.seen_from(self._sensors.base_frame, ODOMETRY_FRAME, _pose(start))
        rows = plan.after_s, plan.xy, plan.yaw, plan.speed
        after_s, xy, yaw, speed = (torch.from_numpy(row).to(start.x) for row in rows)
        published = from_vehicle(start, after_s, xy[None], yaw[None], speed[None])
        self.loop.trajectory = newest(self.loop.trajectory, published)
        self._held_t0_ns = plan.t0_ns

    def _note_missing(self, answer: Answer) -> None:
        problem = answer.problem or "no trajectory yet"
        # Figures in a text (ages, distances) would make every window a reason of its own.
        reason = re.sub(r"[-+]?\d+(\.\d+)?", "...", problem)
        self.log.unanswered[reason] = self.log.unanswered.get(reason, 0) + 1
        self._timeouts = self._timeouts + 1 if answer.timed_out else 0
        if self._timeouts >= _TIMEOUTS:
            raise DriverError(f"{_TIMEOUTS} windows in a row had no answer; {problem}")

    def _note_record(self, record: dict[str, Any]) -> None:
        t0_ns = record["t0_ns"]
        stamps = [t0_ns - k * DT_NS for k in range(FRAMES - 1, -1, -1)]
        frames = record["frame_stamps_ns"].values()
        text = self._texts.get(t0_ns)
        as_sent = (record["nav_text"] or None) == text and all(found == stamps for found in frames)
        self.log.other_inputs += not as_sent
        self.log.texts.append(record["reasoning"])
        self.log.total_ms.append(record["timings_ms"]["total"])


def _pose(state: State) -> tuple[float, float, float]:
    return float(state.x), float(state.y), float(state.yaw)
