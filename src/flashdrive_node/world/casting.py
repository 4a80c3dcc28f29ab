"""Who plays in which scenario: the actors of the event, and traffic around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashdrive_node.world.cast import Cast
from flashdrive_node.world.draws import Floats
from flashdrive_node.world.scene import EGO_FRONT_M, LANE_M, NOWHERE_M, Kind, Scenario

if TYPE_CHECKING:
    from flashdrive_node.world.scenario import Choices

#: trigger_s of agents that move from the start.
AT_ONCE = 1e4


def cast_scenario(cast: Cast, chosen: Choices) -> None:
    """Put the actors of every scenario into slots 0 to 4."""
    _leads(cast, chosen)
    _lane_users(cast, chosen)
    _beside_the_lane(cast, chosen)
    _crossers(cast, chosen)


def cast_traffic(cast: Cast, chosen: Choices) -> None:
    """Oncoming vehicles, vehicles in the next lane, parked cars and people on the pavement, in slots 5 to 11."""
    draws = cast.draws
    everywhere = np.ones(len(chosen.event), bool)
    heavy = np.where(draws.chance("oncoming truck", 0.2), int(Kind.TRUCK), int(Kind.CAR))
    lane = LANE_M * (chosen.left + 1.0)
    at: Floats = draws.uniform("first oncoming", 60, 140)
    for slot in (5, 6, 7):
        present = draws.chance(f"oncoming {slot}", 0.6)
        speed = chosen.limit * draws.uniform(f"oncoming speed {slot}", 0.8, 1.0)
        cast.put(
            present,
            slot,
            heavy if slot == 6 else Kind.CAR,
            s=at,
            d=lane,
            speed=speed,
            direction=-1,
            straight_on=chosen.turning,
        )
        at = at + draws.uniform(f"oncoming gap {slot}", 35, 120)
    beside = draws.chance("next lane", 0.6) & (chosen.left > 0) & ~chosen.picks(Scenario.CUT_IN)
    speed = chosen.limit * draws.uniform("next lane speed", 0.9, 1.1)
    for slot, low, high in ((8, -30.0, -12.0), (9, 14.0, 45.0)):
        some = beside & draws.chance(f"next lane {slot}", 0.7)
        cast.put(
            some, slot, Kind.CAR, s=draws.uniform(f"next lane s {slot}", low, high), d=LANE_M, speed=speed, direction=1
        )
    strip = chosen.parking & ~chosen.picks(Scenario.PEDESTRIAN, Scenario.STOP_SIGN, Scenario.CROSS_TRAFFIC)
    strip &= ~chosen.picks(Scenario.RED_LIGHT, Scenario.GREEN_LIGHT, Scenario.PARKED_CAR)
    in_strip = -(0.5 * LANE_M + 1.15)
    cast.put(strip & draws.chance("parked", 0.8), 10, Kind.CAR, s=draws.uniform("parked s", 25, 90), d=in_strip)
    walker = draws.chance("walker", 0.6) & everywhere
    d = -(LANE_M * (chosen.right + 0.5) + chosen.shoulder + 1.6)
    cast.put(walker, 11, Kind.PEDESTRIAN, s=draws.uniform("walker s", 20, 110), d=d, speed=1.2, direction=1)


def _leads(cast: Cast, chosen: Choices) -> None:
    """Vehicles ahead in the ego's lane."""
    draws, start, limit = cast.draws, chosen.start, chosen.limit
    gap = EGO_FRONT_M + draws.uniform("lead gap", 10, 22) + 1.1 * start
    truck = np.where(draws.chance("lead truck", 0.2), int(Kind.TRUCK), int(Kind.CAR))
    slow = limit * draws.uniform("slow lead", 0.4, 0.65)
    far = gap + draws.uniform("farther lead", 10, 40)
    cast.put(chosen.picks(Scenario.SLOW_LEAD), 0, truck, s=far, d=0, speed=slow, direction=1)
    when = draws.uniform("brake time", 3, 8)
    again = when + draws.uniform("brake for", 4, 8)
    cast.put(
        chosen.picks(Scenario.BRAKING_LEAD), 0, truck, s=gap, d=0, speed=start * 0.95, direction=1,
        schedule=((when, limit * draws.uniform("braked to", 0, 0.35)), (again, limit * 0.9)),
        brake=draws.uniform("brake", 2.5, 4.5),
    )  # fmt: skip
    when = draws.uniform("queue time", 2, 5)
    steps = np.stack([draws.uniform(f"queue step {i}", 3.5, 6.5) for i in range(3)], axis=1).cumsum(axis=1)
    crawl = limit * 0.4
    cast.put(
        chosen.picks(Scenario.STOP_AND_GO), 0, truck, s=gap, d=0, speed=start * 0.9, direction=1,
        schedule=((when, 0.0), (when + steps[:, 0], crawl), (when + steps[:, 1], 0.0), (when + steps[:, 2], crawl)),
        brake=2.5,
    )  # fmt: skip
    queue = chosen.picks(Scenario.RED_LIGHT, Scenario.GREEN_LIGHT) & draws.chance("queue at light", 0.3)
    cast.put(queue, 0, truck, s=gap, d=0, speed=start * 0.95, direction=1)
    company = chosen.turning & draws.chance("lead in turn", 0.25)
    cast.put(company, 0, Kind.CAR, s=gap, d=0, speed=start * 0.9, direction=1)


def _lane_users(cast: Cast, chosen: Choices) -> None:
    """Cut-ins, and what a lane change has to deal with."""
    draws, start, limit = cast.draws, chosen.start, chosen.limit
    cutting = chosen.picks(Scenario.CUT_IN)
    from_right = draws.chance("cut in from the right", 0.4) & (chosen.right > 0)
    side = np.where(from_right, -LANE_M, LANE_M)
    cast.put(
        cutting, 0, Kind.CAR, s=EGO_FRONT_M + draws.uniform("cut-in gap", 9, 16) + 0.3 * start, d=side,
        speed=limit * draws.uniform("cut-in speed", 0.82, 0.95), direction=1, d_target=0.0,
        lateral_speed=draws.uniform("cut-in rate", 0.9, 1.4), trigger_s=-draws.uniform("cut-in time", 1.7, 5),
        schedule=((draws.uniform("cut-in slows", 8, 12), limit * draws.uniform("cut-in to", 0.55, 0.85)),),
    )  # fmt: skip
    passing = chosen.picks(Scenario.LANE_CHANGE)
    cast.put(
        passing, 0, np.where(draws.chance("slow truck", 0.5), int(Kind.TRUCK), int(Kind.CAR)),
        s=EGO_FRONT_M + draws.uniform("slow ahead", 45, 90), d=0, speed=limit * draws.uniform("slow by", 0.3, 0.5),
        direction=1,
    )  # fmt: skip


def _beside_the_lane(cast: Cast, chosen: Choices) -> None:
    """What the ego passes with room to the side."""
    draws = cast.draws
    parked = chosen.picks(Scenario.PARKED_CAR)
    cast.put(parked, 0, Kind.CAR, s=chosen.event, d=-draws.uniform("parked at", 1.15, 2.1), nudge=1)
    riding = chosen.picks(Scenario.CYCLIST)
    cast.put(
        riding, 0, Kind.CYCLIST, s=draws.uniform("cyclist s", 35, 70), d=-draws.uniform("cyclist d", 1.1, 1.5),
        speed=draws.uniform("cyclist speed", 2.8, 4.5), direction=1, nudge=1,
    )  # fmt: skip
    coned = chosen.picks(Scenario.CONES)
    reach = draws.uniform("cones reach", 0.5, 1.3)
    for slot in range(5):
        inwards = -0.5 * LANE_M + reach * min(1.0, slot / 2)
        cast.put(coned, slot, Kind.CONE, s=chosen.event + 4.0 * slot, d=inwards, nudge=1)


def _crossers(cast: Cast, chosen: Choices) -> None:
    """Who crosses the ego's way."""
    draws = cast.draws
    walking = chosen.picks(Scenario.PEDESTRIAN)
    right = -(LANE_M * (chosen.right + 0.5) + chosen.shoulder + 1.0)
    left = LANE_M * (chosen.left + chosen.oncoming + 0.5) + 1.0
    for slot, share in ((0, 1.0), (1, 0.4)):
        some = walking & draws.chance(f"pedestrian {slot}", share)
        from_right = draws.chance(f"from the right {slot}", 0.6)
        cast.put(
            some, slot, Kind.PEDESTRIAN, s=chosen.crosswalk + draws.uniform(f"on the zebra {slot}", -0.9, 0.9),
            d=np.where(from_right, right, left), d_target=np.where(from_right, left, right),
            lateral_speed=draws.uniform(f"walking speed {slot}", 1.1, 1.7),
            trigger_s=draws.uniform(f"steps out {slot}", 3.6, 6.0),
        )  # fmt: skip
    lit = chosen.picks(Scenario.RED_LIGHT, Scenario.GREEN_LIGHT)
    red_s = chosen.green - (chosen.yellow + 3.0)
    across = lit & (red_s > 8) & draws.chance("cross at light", 0.7)
    _crossing_car(cast, chosen, across, 1, np.maximum(chosen.yellow + 3.0, 0) + draws.uniform("cross after", 2.0, 4.0))
    yielding = chosen.picks(Scenario.CROSS_TRAFFIC)
    arrival = chosen.event / np.maximum(chosen.start, 1.0)
    _crossing_car(cast, chosen, yielding, 0, arrival + draws.uniform("cross first", -1.2, 1.5))
    again = (yielding | chosen.picks(Scenario.STOP_SIGN)) & draws.chance("cross again", 0.5)
    _crossing_car(cast, chosen, again, 1, arrival + draws.uniform("cross second", 4, 8))


def _crossing_car(cast: Cast, chosen: Choices, where: np.ndarray, slot: int, at_time: Floats) -> None:
    """A car on the crossing road that passes the ego's lane at a time [S]."""
    draws = cast.draws
    side = draws.sign(f"crossing side {slot}")
    speed = draws.uniform(f"crossing speed {slot}", 7, 11)
    cast.put(
        where & (chosen.junction < NOWHERE_M), slot, Kind.CAR, s=chosen.junction - 0.5 * LANE_M * side,
        d=side * speed * at_time, d_target=-side * 400.0, lateral_speed=speed, trigger_s=AT_ONCE,
    )  # fmt: skip
