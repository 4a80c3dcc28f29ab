"""A drawn road scene: cheap, deterministic pictures that move as the vehicle's odometry says.

Two lanes, dashes, verge posts, trees, houses, a lead car and oncoming traffic on a gently bending road, drawn with
filled polygons in perspective. It exists so that demos and tests have camera streams whose contents agree with their
odometry; it is no rendering of a real road and no input that says anything about driving quality.

World frame: x, y in the plane, z up, metres; the vehicle starts at the origin heading along x. The camera frame is the
optical one: x right, y down, z forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Color = tuple[int, int, int]

#: Heading relative to the vehicle in degrees (left positive) and horizontal field of view in degrees, by the model's
#: camera index.
CAMERA_VIEWS: dict[int, tuple[float, float]] = {
    0: (55.0, 120.0),
    1: (0.0, 120.0),
    2: (-55.0, 120.0),
    3: (150.0, 70.0),
    4: (180.0, 30.0),
    5: (-150.0, 70.0),
    6: (0.0, 30.0),
}
#: Where the cameras sit in the vehicle frame, metres.
CAMERA_POSITION = (1.6, 0.0, 1.5)

LANE_WIDTH_M = 3.5
_STEP_M = 2.0
_AHEAD_M, _BEHIND_M = 170.0, 60.0
_NEAR_M = 0.4
_HAZE = np.array([214.0, 222.0, 228.0])
_SUPERSAMPLE = 2


@dataclass(frozen=True)
class EgoState:
    """The vehicle at one time; position and yaw in the world frame."""

    arc_m: float
    x: float
    y: float
    yaw: float
    speed: float
    yaw_rate: float


@dataclass(frozen=True)
class _Prop:
    """Something beside the road, at an arc length and a lateral offset (left positive)."""

    arc_m: float
    lateral_m: float
    kind: str
    size: float
    color: Color


@dataclass(frozen=True)
class Drive:
    """A road, what stands beside it, and a speed profile, all drawn from one seed."""

    seconds: float
    seed: int = 0
    _time: Array = field(init=False, repr=False)
    _speed: Array = field(init=False, repr=False)
    _arc: Array = field(init=False, repr=False)
    _road: Array = field(init=False, repr=False)
    _props: tuple[_Prop, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        time = np.arange(0.0, self.seconds + 1.0, 0.005)
        phase = rng.uniform(0.0, 2 * np.pi, 3)
        speed = (
            11.5 + 2.0 * np.sin(2 * np.pi * time / 14.0 + phase[0]) + 0.3 * np.sin(2 * np.pi * time / 5.0 + phase[1])
        )
        arc = np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2 * np.diff(time))])
        grid = np.arange(-_BEHIND_M - 20.0, arc[-1] + _AHEAD_M + 20.0, 0.25)
        curvature = 0.011 * np.sin(2 * np.pi * grid / 150.0 + phase[2]) + 0.004 * np.sin(2 * np.pi * grid / 67.0)
        yaw = np.cumsum(curvature) * 0.25
        x, y = np.cumsum(np.cos(yaw)) * 0.25, np.cumsum(np.sin(yaw)) * 0.25
        origin = int(np.argmin(np.abs(grid)))
        turn = np.exp(-1j * yaw[origin])
        at = ((x + 1j * y) - (x[origin] + 1j * y[origin])) * turn
        road = np.stack([grid, at.real, at.imag, yaw - yaw[origin], curvature])
        for name, value in {
            "_time": time,
            "_speed": speed,
            "_arc": arc,
            "_road": road,
            "_props": _roadside(rng, float(grid[0]), float(grid[-1])),
        }.items():
            object.__setattr__(self, name, value)

    def ego(self, time_s: float) -> EgoState:
        """State at a time of the drive; the vehicle follows the middle of the right-hand lane."""
        arc = float(np.interp(time_s, self._time, self._arc))
        speed = float(np.interp(time_s, self._time, self._speed))
        _, x, y, yaw, curvature = self.road(np.array([arc]))[:, 0]
        return EgoState(arc, float(x), float(y), float(yaw), speed, speed * float(curvature))

    def road(self, arc_m: Array) -> Array:
        """Rows arc, x, y, yaw, curvature of the lane's middle at the given arc lengths."""
        grid = self._road[0]
        return np.stack([arc_m, *(np.interp(arc_m, grid, row) for row in self._road[1:])])

    def beside(self, arc_m: Array, lateral_m: Array | float, height_m: Array | float = 0.0) -> Array:
        """World points [N, 3] at arc lengths and lateral offsets (left positive) from the lane's middle."""
        _, x, y, yaw, _ = self.road(np.atleast_1d(arc_m))
        lateral = np.broadcast_to(lateral_m, x.shape)
        return np.stack(
            [x - lateral * np.sin(yaw), y + lateral * np.cos(yaw), np.broadcast_to(height_m, x.shape)], axis=1
        )

    def draw(self, time_s: float, camera_index: int, width: int, height: int, label: str = "") -> NDArray[np.uint8]:
        """The picture of one camera at a time of the drive: RGB uint8 [height, width, 3].

        Args:
            time_s: Time since the start of the drive.
            camera_index: Index in the model's naming, 0 to 6.
            width: Columns of the picture.
            height: Rows of the picture.
            label: Text written small into the lower left corner.
        """
        ego = self.ego(time_s)
        view = _View.of(ego, camera_index, width * _SUPERSAMPLE, height * _SUPERSAMPLE)
        view.background()
        self._draw_road(view, ego.arc_m)
        self._draw_objects(view, ego.arc_m, time_s)
        picture = cv2.resize(view.canvas, (width, height), interpolation=cv2.INTER_AREA)
        if label:
            scale, x, y = height / 800.0, int(0.012 * width), height - int(0.022 * height)
            for shift, gray in ((1, 20), (0, 250)):
                at = (x + shift, y + shift)
                cv2.putText(picture, label, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (gray, gray, gray), 1, cv2.LINE_AA)
        return np.ascontiguousarray(picture, dtype=np.uint8)

    def _draw_road(self, view: _View, arc_m: float) -> None:
        first = np.floor((arc_m - _BEHIND_M) / _STEP_M) * _STEP_M
        arcs = np.arange(first, arc_m + _AHEAD_M, _STEP_M)
        half = LANE_WIDTH_M / 2
        stripes = (
            (-half - 0.9, half + LANE_WIDTH_M + 0.9, (150, 141, 122), 0),
            (-half - 0.25, half + LANE_WIDTH_M + 0.25, (88, 90, 94), 0),
            (-half - 0.05, -half + 0.1, (232, 232, 226), 0),
            (half + LANE_WIDTH_M - 0.1, half + LANE_WIDTH_M + 0.05, (232, 232, 226), 0),
            (half - 0.08, half + 0.08, (240, 208, 96), 6),
        )
        for right_m, left_m, color, dash in stripes:
            right = view.to_camera(self.beside(arcs, right_m))
            left = view.to_camera(self.beside(arcs, left_m))
            for i in range(len(arcs) - 2, -1, -1):
                # A dash is painted on two steps of every six: the phase belongs to the road, so dashes scroll by.
                if dash and int(arcs[i] // _STEP_M) % dash >= 2:
                    continue
                view.polygon(np.stack([right[i], right[i + 1], left[i + 1], left[i]]), color)

    def _draw_objects(self, view: _View, arc_m: float, time_s: float) -> None:
        vehicles = [_Prop(arc_m + 24.0 + 7.0 * np.sin(0.45 * time_s), 0.0, "car", 1.0, (168, 34, 38))]
        for k in range(8):
            start = 90.0 + 95.0 * k - 9.0 * time_s
            color: Color = ((52, 84, 150), (222, 222, 224), (58, 62, 66))[k % 3]
            vehicles.append(_Prop(start, LANE_WIDTH_M, "car", -1.0, color))
        near = [p for p in (*self._props, *vehicles) if arc_m - _BEHIND_M < p.arc_m < arc_m + _AHEAD_M]
        places = self.road(np.array([p.arc_m for p in near]))
        feet = np.concatenate([self.beside(np.array([p.arc_m]), p.lateral_m) for p in near])
        depth = view.to_camera(feet)
        for i in np.argsort(-np.linalg.norm(depth, axis=1)):
            _draw_prop(view, near[i], feet[i], float(places[3, i]))


def _roadside(rng: np.random.Generator, start: float, end: float) -> tuple[_Prop, ...]:
    props: list[_Prop] = []
    for arc in np.arange(np.ceil(start / 25.0) * 25.0, end, 25.0):
        for lateral in (-LANE_WIDTH_M / 2 - 1.0, LANE_WIDTH_M * 1.5 + 1.0):
            props.append(_Prop(float(arc), lateral, "post", 1.0, (238, 238, 238)))
    for arc in np.arange(start, end, 6.5):
        side = 1.0 if rng.random() < 0.5 else -1.0
        lateral = side * rng.uniform(7.0, 26.0) + LANE_WIDTH_M / 2
        if rng.random() < 0.8:
            green = (int(rng.integers(44, 84)), int(rng.integers(92, 138)), int(rng.integers(36, 62)))
            props.append(_Prop(float(arc), lateral, "tree", float(rng.uniform(0.8, 1.7)), green))
        else:
            wall = ((206, 190, 164), (190, 166, 150), (226, 222, 208))[int(rng.integers(3))]
            props.append(_Prop(float(arc), lateral + side * 9.0, "house", float(rng.uniform(0.8, 1.3)), wall))
    return tuple(props)


def _draw_prop(view: _View, prop: _Prop, foot: Array, yaw: float) -> None:
    if prop.kind == "post":
        view.box(foot, yaw, (0.12, 0.12, 0.9), prop.color)
    elif prop.kind == "car":
        view.box(foot, yaw, (4.4, 1.85, 0.85), prop.color, lift=0.25)
        view.box(foot, yaw, (2.3, 1.65, 0.55), (46, 54, 64), lift=1.1)
        lamp: Color = (226, 40, 36) if prop.size > 0 else (255, 250, 214)
        for lateral in (-0.65, 0.65):
            back = foot + _turn(yaw) @ np.array([-2.22, lateral, 0.0])
            view.box(back, yaw, (0.06, 0.4, 0.2), lamp, lift=0.7)
    elif prop.kind == "house":
        size = prop.size
        view.box(foot, yaw, (11.0 * size, 8.0, 4.6 * size), prop.color)
        view.box(foot, yaw, (11.8 * size, 8.6, 1.5), (142, 74, 58), lift=4.6 * size)
    else:
        view.box(foot, yaw, (0.35, 0.35, 2.0 * prop.size), (96, 72, 50))
        for lift, radius, shade in ((2.6, 1.7, 0.86), (3.5, 1.35, 1.0), (4.3, 0.85, 1.12)):
            color = tuple(int(min(255, c * shade)) for c in prop.color)
            view.ball(foot + np.array([0.0, 0.0, lift * prop.size]), radius * prop.size, (color[0], color[1], color[2]))


def _turn(yaw: float) -> Array:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


@dataclass
class _View:
    """A level pinhole camera and the canvas that it draws on."""

    rotation: Array
    position: Array
    heading: float
    focal: float
    canvas: NDArray[np.uint8]

    @classmethod
    def of(cls, ego: EgoState, camera_index: int, width: int, height: int) -> _View:
        yaw_deg, fov_deg = CAMERA_VIEWS[camera_index]
        heading = ego.yaw + np.radians(yaw_deg)
        forward = np.array([np.cos(heading), np.sin(heading), 0.0])
        right = np.array([np.sin(heading), -np.cos(heading), 0.0])
        rotation = np.stack([right, np.array([0.0, 0.0, -1.0]), forward])
        position = np.array([ego.x, ego.y, 0.0]) + _turn(ego.yaw) @ np.array(CAMERA_POSITION)
        focal = width / 2 / np.tan(np.radians(fov_deg) / 2)
        return cls(rotation, position, heading, focal, np.empty((height, width, 3), np.uint8))

    def to_camera(self, points: Array) -> Array:
        """World points [N, 3] in the optical frame."""
        return (points - self.position) @ self.rotation.T

    def background(self) -> None:
        """Sky, hills and ground; the camera is level, so the horizon is the middle row."""
        height, width = self.canvas.shape[:2]
        horizon = height // 2
        up = np.linspace(1.0, 0.0, horizon)[:, None] ** 0.8
        sky = (1 - up) * _HAZE + up * np.array([104.0, 152.0, 206.0])
        down = np.linspace(0.0, 1.0, height - horizon)[:, None] ** 0.45
        ground = (1 - down) * np.array([168.0, 180.0, 150.0]) + down * np.array([98.0, 128.0, 72.0])
        self.canvas[:] = np.concatenate([sky, ground])[:, None].astype(np.uint8)
        columns = np.linspace(0, width - 1, 64)
        azimuth = self.heading - np.arctan((columns - width / 2) / self.focal)
        for base, swing, color in ((0.035, 0.022, (182, 196, 206)), (0.014, 0.012, (150, 172, 162))):
            rise = base + swing * (np.sin(5 * azimuth + base * 90) + 0.5 * np.sin(13 * azimuth))
            rows = horizon - np.maximum(rise, 0.0) * self.focal
            outline = np.concatenate([[[0, horizon]], np.stack([columns, rows], 1), [[width - 1, horizon]]])
            cv2.fillPoly(self.canvas, [outline.astype(np.int32)], color)

    def polygon(self, corners: Array, color: Color, shade: float = 1.0) -> None:
        """Fill a convex polygon given in the optical frame [N, 3], cut at the near plane and hazed by distance."""
        if (corners[:, 2] < _NEAR_M).any():
            corners = _clip_near(corners)
            if len(corners) < 3:
                return
        height, width = self.canvas.shape[:2]
        pixels = corners[:, :2] / corners[:, 2:] * self.focal + (width / 2, height / 2)
        low, high = pixels.min(0), pixels.max(0)
        if high[0] < 0 or low[0] >= width or high[1] < 0 or low[1] >= height:
            return
        haze = 1.0 - np.exp(-float(np.linalg.norm(corners.mean(0))) / 190.0)
        mixed = (1 - haze) * shade * np.array(color, np.float64) + haze * _HAZE
        fill = tuple(int(c) for c in np.clip(mixed, 0, 255))
        cv2.fillConvexPoly(self.canvas, np.clip(pixels, -20000, 20000).astype(np.int32), fill)

    def box(self, foot: Array, yaw: float, size: tuple[float, float, float], color: Color, lift: float = 0.0) -> None:
        """An upright box standing ``lift`` metres over a world point: size along, across and up."""
        half_x, half_y = size[0] / 2, size[1] / 2
        low = np.array([[half_x, half_y], [half_x, -half_y], [-half_x, -half_y], [-half_x, half_y]])
        turned = low @ _turn(yaw)[:2, :2].T + foot[:2]
        floor = self.to_camera(np.column_stack([turned, np.full(4, foot[2] + lift)]))
        roof = self.to_camera(np.column_stack([turned, np.full(4, foot[2] + lift + size[2])]))
        middle = (floor.mean(0) + roof.mean(0)) / 2
        if middle[2] < -max(size):
            return
        faces = [(np.stack([floor[i], floor[j], roof[j], roof[i]]), s) for i, j, s in _BOX_SIDES]
        faces.append((roof, 1.12))
        for corners, shade in sorted(faces, key=lambda face: -float(np.linalg.norm(face[0].mean(0)))):
            outward = corners.mean(0) - middle
            if float(outward @ corners.mean(0)) < 0:
                self.polygon(corners, color, shade)

    def ball(self, center: Array, radius_m: float, color: Color) -> None:
        """A filled circle of a size in metres around a world point."""
        at = self.to_camera(center[None])[0]
        if at[2] < 1.0:
            return
        angle = np.linspace(0.0, 2 * np.pi, 18, endpoint=False)
        wobble = radius_m * (1 + 0.08 * np.sin(5 * angle))
        ring = np.stack([at[0] + wobble * np.cos(angle), at[1] + wobble * np.sin(angle), np.full(18, at[2])], axis=1)
        self.polygon(ring, color)


#: Corner indices and brightness of the four sides of a box.
_BOX_SIDES = ((0, 1, 0.94), (1, 2, 0.8), (2, 3, 0.9), (3, 0, 0.72))


def _clip_near(corners: Array) -> Array:
    """Cut a polygon at the near plane."""
    kept: list[Array] = []
    for i, end in enumerate(corners):
        start = corners[i - 1]
        if (start[2] >= _NEAR_M) != (end[2] >= _NEAR_M):
            kept.append(start + (end - start) * (_NEAR_M - start[2]) / (end[2] - start[2]))
        if end[2] >= _NEAR_M:
            kept.append(end)
    return np.array(kept).reshape(-1, 3)
