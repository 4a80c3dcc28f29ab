"""Choosing scenes: from keys to a batch of `Scene`, on the CPU, the same numbers everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashdrive_node.world.cast import Cast
from flashdrive_node.world.casting import cast_scenario, cast_traffic
from flashdrive_node.world.draws import Draws, Floats, Keys
from flashdrive_node.world.road import chain
from flashdrive_node.world.scene import (
    CROSSWALK_M,
    LANE_M,
    NOWHERE_M,
    STOP_BEFORE_CROSSWALK_M,
    Control,
    Scenario,
    Scene,
)
from flashdrive_node.world.weather import sample_props, sample_weather

Mask = NDArray[np.bool_]

#: Roads begin this far behind the ego, metres.
_BEHIND_M = 120.0


def sample_scenes(keys: Keys, scenario: Scenario | None = None) -> Scene:
    """Scenes of these keys (see `draws.scene_keys`), on the CPU.

    Args:
        keys: uint64 [S].
        scenario: The same for all; without it the keys choose, all scenarios equally often.
    """
    draws = Draws(keys)
    chosen = draws.integer("scenario", len(Scenario)) if scenario is None else np.full(len(draws.keys), int(scenario))
    return Choices(draws, chosen).scene()


class Choices:
    """The choices for one batch of scenes; every method settles one part and reads those settled before it."""

    def __init__(self, draws: Draws, chosen: NDArray[np.int64]):
        self.draws = draws
        self.chosen = chosen
        self.cast = Cast(draws)
        self._lanes()
        self._places()

    def picks(self, *scenarios: Scenario) -> Mask:
        """Which scenes are of one of these scenarios: [S]."""
        return np.isin(self.chosen, [int(s) for s in scenarios])

    def _lanes(self) -> None:
        draws = self.draws
        self.turning = self.picks(Scenario.TURN_LEFT, Scenario.TURN_RIGHT)
        curvy = self.picks(Scenario.CURVE)
        changing = self.picks(Scenario.LANE_CHANGE, Scenario.MERGE)
        narrow = self.turning | curvy | self.picks(Scenario.PEDESTRIAN, Scenario.SPEED_BUMP, Scenario.PARKED_CAR)
        narrow |= self.picks(Scenario.CYCLIST, Scenario.CROSS_TRAFFIC, Scenario.CONES)
        fast = draws.uniform("fast limit", 11.0, 17.0)
        slow = draws.uniform("slow limit", 7.5, 11.5)
        self.limit: Floats = np.where(narrow, slow, fast)
        left, right = draws.integer("lanes left", 2), draws.integer("lanes right", 2)
        self.left = np.where(narrow | self.turning, 0, left)
        self.right = np.where(narrow | self.turning, 0, right)
        # A lane change goes left round a slow vehicle; a lane that ends is the rightmost.
        self.left = np.where(changing | self.picks(Scenario.CUT_IN), np.maximum(self.left, 1), self.left)
        self.right = np.where(changing, 0, self.right)
        self.oncoming = np.where(self.turning, 1, 1 + draws.chance("wide oncoming", 0.3) * (self.left + self.right > 0))
        parking = draws.chance("parking strip", 0.5) & (self.right == 0) & ~changing & ~self.turning
        parking |= self.picks(Scenario.PARKED_CAR)
        self.shoulder: Floats = np.where(parking, 2.2, 0.6)
        self.parking = parking
        self.start: Floats = self.limit * draws.uniform("start speed", 0.75, 1.0)

    def _places(self) -> None:
        """Where the event of a scene is, and the road up to there."""
        draws, limit = self.draws, self.limit
        nowhere = np.full(len(self.chosen), NOWHERE_M)
        #: Seconds after the start at which an undisturbed ego would reach the event.
        event_s = self.start * draws.uniform("event time", 6.0, 12.0) + 15.0
        near_s = self.start * draws.uniform("near event time", 4.0, 6.0) + 15.0
        self.event = np.where(self.picks(Scenario.GREEN_LIGHT), near_s, event_s)
        lit = self.picks(Scenario.RED_LIGHT, Scenario.GREEN_LIGHT)
        signed = self.picks(Scenario.STOP_SIGN, Scenario.CROSS_TRAFFIC)
        crossing = lit | signed | self.turning
        zebra = self.picks(Scenario.PEDESTRIAN) | (lit & draws.chance("zebra at light", 0.6))
        self.turn = np.where(self.picks(Scenario.TURN_LEFT), 1, np.where(self.picks(Scenario.TURN_RIGHT), -1, 0))
        self.radius = np.where(
            self.turn > 0, draws.uniform("left radius", 9, 12), draws.uniform("right radius", 6.5, 8)
        )
        self.turn_s = np.where(self.turning, self.event, NOWHERE_M)
        # The ego ends up in the lane that its turn leads to: the near one to the right, the far one to the left.
        middle = self.event + self.radius - 0.5 * LANE_M * self.turn
        straight_middle = self.event + LANE_M + 3.0 + np.where(zebra, CROSSWALK_M + STOP_BEFORE_CROSSWALK_M, 0.0)
        self.junction = np.where(self.turning, middle, np.where(crossing, straight_middle, NOWHERE_M))
        halting = lit | self.picks(Scenario.STOP_SIGN, Scenario.CROSS_TRAFFIC, Scenario.PEDESTRIAN)
        self.stop_line = np.where(halting, self.event, np.where(self.turning, self.event - 1.0, NOWHERE_M))
        self.crosswalk = np.where(zebra, self.event + STOP_BEFORE_CROSSWALK_M + 0.5 * CROSSWALK_M, NOWHERE_M)
        self.bump = np.where(self.picks(Scenario.SPEED_BUMP), self.event, nowhere)
        self.merge = np.where(self.picks(Scenario.MERGE), self.event + 95.0, nowhere)
        control = np.where(lit, int(Control.LIGHT), np.where(self.picks(Scenario.STOP_SIGN), int(Control.STOP_SIGN), 0))
        self.control = control
        arrival = self.event / np.maximum(self.start, 1.0)
        late = draws.chance("turns red in front of the ego", 0.5)
        yellow = np.where(late, arrival - draws.uniform("yellow before", 3.0, 7.0), -10.0)
        green = np.where(late, yellow + draws.uniform("long red", 12, 18), draws.uniform("late green", 15, 23))
        soon = self.picks(Scenario.GREEN_LIGHT)
        self.yellow = np.where(lit, np.where(soon, -10.0, yellow), NOWHERE_M)
        self.green = np.where(soon, arrival + draws.uniform("early green", -1.0, 4.0), green)
        self.change = np.where(self.picks(Scenario.LANE_CHANGE, Scenario.MERGE), LANE_M, 0.0)
        self.change_s = np.where(self.picks(Scenario.MERGE), self.event - 10.0, 10.0 + 0 * limit)

    def _road(self) -> Any:
        draws = self.draws
        scenes = len(self.chosen)
        lengths, bends = np.zeros((scenes, 6)), np.zeros((scenes, 6))
        curve = self.picks(Scenario.CURVE)
        gentle = self.picks(Scenario.CRUISE, Scenario.SLOW_LEAD, Scenario.BRAKING_LEAD, Scenario.STOP_AND_GO)
        gentle |= self.picks(Scenario.CUT_IN, Scenario.PARKED_CAR, Scenario.CYCLIST, Scenario.LANE_CHANGE)
        side = draws.sign("bend side")
        sharp = draws.uniform("curve radius", 16, 38)
        lengths[:, 0] = _BEHIND_M + np.where(curve, self.event, draws.uniform("first bend", 15, 70))
        lengths[:, 1] = np.where(curve, sharp * draws.uniform("turn by", 0.6, 1.4), draws.uniform("bend", 40, 110))
        lengths[:, 2] = draws.uniform("between bends", 15, 70)
        lengths[:, 3] = np.where(
            curve, sharp * draws.uniform("second turn", 0.5, 1.2), draws.uniform("bend 2", 40, 110)
        )
        lengths[:, 4], lengths[:, 5] = 100.0, 3000.0
        wide = np.where(draws.chance("bends", 0.65) & gentle, 1 / draws.uniform("bend radius", 160, 500), 0.0)
        bends[:, 1] = side * np.where(curve, 1 / sharp, wide)
        bends[:, 3] = np.where(draws.chance("s bend", 0.5), -1.0, 1.0) * bends[:, 1]
        turning = self.turning
        lengths[turning, 0] = (_BEHIND_M + self.turn_s)[turning]
        lengths[turning, 1] = (self.radius * np.pi / 2)[turning]
        bends[turning, 1] = (self.turn / self.radius)[turning]
        bends[turning, 3] = 0.0
        return chain(lengths, bends, -_BEHIND_M)

    def scene(self) -> Scene:
        """All of it, as tensors."""
        draws = self.draws
        cast_scenario(self.cast, self)
        cast_traffic(self.cast, self)
        left_edge = LANE_M * (self.left + self.oncoming + 0.5)
        right_edge = LANE_M * (self.right + 0.5) + self.shoulder
        frame = np.stack((np.zeros_like(self.event),) * 4, axis=1)
        frame[:, 0] = frame[:, 3] = -_BEHIND_M
        lights = np.stack((self.yellow, self.yellow + 3.0, self.green), axis=1)
        lights[self.control != int(Control.LIGHT)] = NOWHERE_M

        def real(a: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(a, dtype=np.float64))

        def whole(a: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64))

        return Scene(
            key=whole((draws.bits("wording") >> np.uint64(33)).astype(np.int64)),
            scenario=whole(self.chosen),
            road=self._road(),
            speed_limit=real(self.limit),
            start_speed=real(self.start),
            lanes_left=whole(self.left),
            lanes_right=whole(self.right),
            lanes_oncoming=whole(self.oncoming),
            shoulder=real(self.shoulder),
            control=whole(self.control),
            junction_s=real(self.junction),
            junction_frame=real(frame),
            stop_line_s=real(self.stop_line),
            crosswalk_s=real(self.crosswalk),
            bump_s=real(self.bump),
            merge_s=real(self.merge),
            turn=whole(self.turn),
            turn_s=real(self.turn_s),
            change_d=real(self.change),
            change_s=real(self.change_s),
            light_times=real(lights),
            agents=self.cast.agents(),
            weather=sample_weather(draws),
            props=sample_props(draws, left_edge, right_edge, self.junction),
        )
