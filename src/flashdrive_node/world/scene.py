"""What a scene is: everything about it that does not change while it is driven.

S scenes, A agents, K road pieces. Road coordinates (s, d) are those of the ego lane's centre: s metres along, d metres
to the left. Speeds in m/s, times in seconds since the start, angles in radians. Traffic keeps right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flashdrive_node.world.road import Road

_Tree = TypeVar("_Tree")

#: Seconds per step, as in the action space of the model.
DT_S = 0.1
LANE_M = 3.5
#: Body of the ego vehicle: rear axle to front and rear bumper, width, height, metres.
EGO_FRONT_M, EGO_REAR_M, EGO_WIDTH_M, EGO_HEIGHT_M = 3.8, 1.0, 1.9, 1.5
#: A position that is never reached, for what a scene does not have.
NOWHERE_M = 1e6
#: Length of a zebra crossing along the road, and from its near edge back to the stop line, metres.
CROSSWALK_M, STOP_BEFORE_CROSSWALK_M = 3.0, 1.5


class Scenario(IntEnum):
    """What a scene is about."""

    CRUISE = 0
    SLOW_LEAD = 1
    BRAKING_LEAD = 2
    STOP_AND_GO = 3
    RED_LIGHT = 4
    GREEN_LIGHT = 5
    STOP_SIGN = 6
    PEDESTRIAN = 7
    CUT_IN = 8
    PARKED_CAR = 9
    LANE_CHANGE = 10
    CURVE = 11
    TURN_LEFT = 12
    TURN_RIGHT = 13
    MERGE = 14
    CONES = 15
    CYCLIST = 16
    CROSS_TRAFFIC = 17
    SPEED_BUMP = 18


class Kind(IntEnum):
    """What an agent is."""

    NOTHING = 0
    CAR = 1
    TRUCK = 2
    CYCLIST = 3
    PEDESTRIAN = 4
    CONE = 5


class Control(IntEnum):
    """What rules a junction or crossing."""

    NONE = 0
    LIGHT = 1
    STOP_SIGN = 2


class Light(IntEnum):
    """What a traffic light shows."""

    GREEN = 0
    YELLOW = 1
    RED = 2


@dataclass(frozen=True)
class Agents:
    """Everybody else: [S, A] each."""

    kind: Tensor
    #: 1 with the ego, -1 towards it, 0 across the road or standing.
    direction: Tensor
    #: Drives straight on through the junction where the ego's road turns.
    straight_on: Tensor
    s0: Tensor
    d0: Tensor
    length: Tensor
    width: Tensor
    height: Tensor
    #: Speed wanted from the start and from each of the times on [S, A, T + 1] and [S, A, T].
    speeds: Tensor
    times: Tensor
    #: Deceleration when the wanted speed drops, m/s^2.
    brake: Tensor
    #: Where it moves sideways to, and how fast; across the road the destination and the walking or driving speed.
    d_target: Tensor
    lateral_speed: Tensor
    #: It begins to move sideways when the ego is this many seconds away; at -trigger_s where that is negative.
    trigger_s: Tensor
    #: The ego passes it with room to the side.
    nudge: Tensor
    #: Picks the paint, 0 .. 255.
    paint: Tensor


@dataclass(frozen=True)
class Weather:
    """Light and air: [S] or [S, 3] each."""

    #: Direction to the sun, unit vectors [S, 3].
    sun: Tensor
    #: Linear light of sky and sun [S, 3].
    ambient: Tensor
    sunlight: Tensor
    #: Colours of the sky overhead and at the horizon [S, 3].
    zenith: Tensor
    horizon: Tensor
    #: Distance over which contrast falls to 1/e, metres.
    visibility: Tensor
    #: 0 by day, 1 at night: headlights and lit windows.
    night: Tensor


@dataclass(frozen=True)
class Props:
    """Things beside the road that stand still: [S, N] each."""

    #: 0 nothing, 1 tree, 2 building, 3 lamp post.
    kind: Tensor
    s: Tensor
    d: Tensor
    #: Radius or half length and half width, height, metres.
    size: Tensor
    height: Tensor
    paint: Tensor


@dataclass(frozen=True)
class Scene:
    """A batch of scenes. Scalars per scene are [S]."""

    #: Low and high 31 bits of the key, for choosing among wordings.
    key: Tensor
    scenario: Tensor
    road: Road
    speed_limit: Tensor
    start_speed: Tensor
    #: Lanes beside the ego's: same direction to the left and right, and oncoming ones.
    lanes_left: Tensor
    lanes_right: Tensor
    lanes_oncoming: Tensor
    #: Width of the shoulder or parking strip on the right, metres.
    shoulder: Tensor
    control: Tensor
    #: Where a crossing road's middle lies along the ego's road, and where its straight frame begins (x, y, yaw, s).
    junction_s: Tensor
    junction_frame: Tensor
    stop_line_s: Tensor
    crosswalk_s: Tensor
    bump_s: Tensor
    #: Where the ego's lane ends.
    merge_s: Tensor
    #: -1 right, 1 left, 0 straight on; and where the turn begins.
    turn: Tensor
    turn_s: Tensor
    #: Lane change that is wanted: sideways by, from where on.
    change_d: Tensor
    change_s: Tensor
    #: When the light becomes yellow, red and green again [S, 3].
    light_times: Tensor
    agents: Agents
    weather: Weather
    props: Props

    def __len__(self) -> int:
        return len(self.scenario)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.scenario.device

    def light(self, time_s: Tensor) -> Tensor:
        """`Light` at a time: [S] -> [S]."""
        yellow, red, green = self.light_times.unbind(1)
        red_now = (time_s >= red) & (time_s < green)
        yellow_now = (time_s >= yellow) & (time_s < red)
        return torch.where(red_now, int(Light.RED), torch.where(yellow_now, int(Light.YELLOW), int(Light.GREEN)))

    @property
    def left_edge(self) -> Tensor:
        """Left edge of the asphalt [S], metres."""
        return LANE_M * (self.lanes_left + self.lanes_oncoming + 0.5)

    def right_edge(self, s: Tensor) -> Tensor:
        """Right edge of the asphalt, as d, at s: [S, P] -> [S, P], metres; an ending lane tapers away over 40 m."""
        full = -(LANE_M * (self.lanes_right + 0.5) + self.shoulder)[:, None]
        return full + LANE_M * ((s - self.merge_s[:, None]) / 40.0 + 1.0).clamp(0, 1)


def move(tree: _Tree, device: torch.device | str) -> _Tree:
    """A dataclass of tensors (and such dataclasses) on another device."""
    return map_tensors(tree, lambda t: t.to(device))


def map_tensors(tree: _Tree, function: Callable[[Tensor], Tensor]) -> _Tree:
    """Apply a function to every tensor of a dataclass of tensors."""
    values = {f.name: getattr(tree, f.name) for f in fields(cast(Any, tree))}
    return type(tree)(
        **{n: function(v) if isinstance(v, Tensor) else map_tensors(v, function) for n, v in values.items()}
    )


def select(tree: _Tree, rows: Tensor) -> _Tree:
    """Scenes (or states) at these rows: an index or mask tensor."""
    return map_tensors(tree, lambda t: t[rows])
