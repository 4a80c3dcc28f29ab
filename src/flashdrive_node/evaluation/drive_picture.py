"""One moment of a drive as a picture of 1920 x 1080: cameras with the planned path in them, plan view, reasoning."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flashdrive_node.evaluation.plan_view import PlanFrame
from flashdrive_node.evaluation.strips import Color, Strip, strip_colors
from flashdrive_node.runtime.camera_model import CameraModel

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]

WIDTH, HEIGHT = 1920, 1080
CAMERA_SIZE = (672, 374)
#: The plan view stands to the right of two columns of cameras; text and the strips of causes stand below.
PLAN = PlanFrame(WIDTH - 2 * CAMERA_SIZE[0], 2 * CAMERA_SIZE[1])
_TOP = 2 * CAMERA_SIZE[1]
PLANNED, DRIVEN = (64, 156, 255), (255, 196, 60)
_INK, _DIM, _PAPER, _LINE = (238, 240, 243), (150, 158, 168), (18, 21, 26), (60, 66, 74)
_AGREES, _DIFFERS = (96, 211, 130), (255, 120, 110)
#: Of the ribbon that marks the planned path in the cameras: half width on the road, metres; share of its colour.
_HALF_WIDTH_M, _SHARE = 0.75, 0.55
_SHIFT = 4


@dataclass(frozen=True)
class View:
    """One camera: its name, its picture RGB uint8 [H, W, 3], and its calibration where it is known."""

    name: str
    picture: Picture
    model: CameraModel | None = None


@dataclass(frozen=True)
class Moment:
    """What a picture shows. Paths are [N, 3] in the vehicle frame at this moment, metres."""

    time_s: float
    #: Up to four, in reading order.
    views: Sequence[View]
    planned: Array
    #: Ground truth, or None.
    driven: Array | None
    #: What the model says, what is true (None where nobody knows), and how they compare: a few words, and good or bad.
    said: str
    truth: str | None = None
    verdict: tuple[str, bool] | None = None
    navigation: str = ""
    #: Whose the planned path is.
    planner: str = "the model"
    #: Names and values of a few figures.
    figures: Sequence[tuple[str, str]] = ()
    #: RGB of `PLAN`'s size, or None for an empty ground.
    ground: Picture | None = None
    #: Length, width and rear overhang of the vehicle, metres.
    vehicle: tuple[float, float, float] = (4.8, 1.9, 1.0)
    strips: Sequence[Strip] = field(default_factory=tuple)
    duration_s: float = 0.0
    note: str = ""


def draw_moment(moment: Moment) -> Picture:
    """The picture: RGB uint8 [1080, 1920, 3]."""
    canvas = np.full((HEIGHT, WIDTH, 3), _PAPER, np.uint8)
    for place, view in enumerate(moment.views[:4]):
        x, y = (place % 2) * CAMERA_SIZE[0], (place // 2) * CAMERA_SIZE[1]
        canvas[y : y + CAMERA_SIZE[1], x : x + CAMERA_SIZE[0]] = _camera(view, moment)
    canvas[:_TOP, 2 * CAMERA_SIZE[0] :] = _plan(moment)
    for x in (CAMERA_SIZE[0], 2 * CAMERA_SIZE[0]):
        cv2.line(canvas, (x, 0), (x, _TOP), _PAPER, 3)
    cv2.line(canvas, (0, CAMERA_SIZE[1]), (2 * CAMERA_SIZE[0], CAMERA_SIZE[1]), _PAPER, 3)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    for place, view in enumerate(moment.views[:4]):
        at = ((place % 2) * CAMERA_SIZE[0] + 14, (place // 2) * CAMERA_SIZE[1] + 10)
        _tag(draw, at, view.name.replace("_", " "))
    _legend(draw, moment)
    _words(draw, moment)
    _figures(draw, moment)
    _strips(draw, moment)
    return np.asarray(image, np.uint8)


def _camera(view: View, moment: Moment) -> Picture:
    picture = np.asarray(cv2.resize(view.picture, CAMERA_SIZE, interpolation=cv2.INTER_CUBIC), np.uint8)
    if view.model is None:
        return picture
    # Pixel centres of the small picture in the large one.
    scale = np.array([CAMERA_SIZE[0] / view.model.width, CAMERA_SIZE[1] / view.model.height])
    left, right = (_project(view.model, edge, scale) for edge in ribbon_edges(moment.planned, _HALF_WIDTH_M))
    layer = picture.copy()
    for i in range(len(left) - 1):
        quad = np.stack((left[i], left[i + 1], right[i + 1], right[i]))
        if np.isfinite(quad).all():
            cv2.fillConvexPoly(layer, _fixed(quad), PLANNED, cv2.LINE_AA, _SHIFT)
    picture = np.asarray(cv2.addWeighted(layer, _SHARE, picture, 1 - _SHARE, 0), np.uint8)
    if moment.driven is not None:
        _polyline(picture, _project(view.model, moment.driven, scale), DRIVEN, 2)
    return picture


def ribbon_edges(path: Array, half_width_m: float) -> tuple[Array, Array]:
    """Left and right edge [M, 3] of a band around a path [N, 3]; where the path stands still, points are left out."""
    step = np.linalg.norm(np.diff(path[:, :2], axis=0, prepend=np.inf), axis=1)
    moved = path[step > 1e-3]
    if len(moved) < 2:
        return np.empty((0, 3)), np.empty((0, 3))
    along = np.gradient(moved[:, :2], axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    aside = np.concatenate((-along[:, 1:], along[:, :1], np.zeros((len(moved), 1))), axis=1) * half_width_m
    return moved + aside, moved - aside


def _project(model: CameraModel, points: Array, scale: Array) -> Array:
    pixels = (model.project(points) + 0.5) * scale - 0.5
    # Far outside, lines would overflow the fixed point numbers of OpenCV.
    far = np.abs(pixels).max(axis=1, initial=0.0) > 20.0 * max(CAMERA_SIZE)
    return np.where(far[:, None], np.nan, pixels)


def _plan(moment: Moment) -> Picture:
    view = np.full((PLAN.height, PLAN.width, 3), (34, 39, 46), np.uint8) if moment.ground is None else moment.ground
    view = view.copy()
    for ahead in range(20, int(PLAN.ahead_m), 20):
        row = round(PLAN.ahead_m * PLAN.scale - ahead * PLAN.scale)
        cv2.line(view, (PLAN.width - 26, row), (PLAN.width, row), _INK, 1, cv2.LINE_AA)
    edges = ribbon_edges(moment.planned, _HALF_WIDTH_M)
    if len(edges[0]):
        layer = view.copy()
        outline = np.concatenate((edges[0], edges[1][::-1]))[:, :2]
        cv2.fillPoly(layer, [_fixed(PLAN.pixels(outline))], PLANNED, cv2.LINE_AA, _SHIFT)
        view = np.asarray(cv2.addWeighted(layer, 0.75, view, 0.25, 0), np.uint8)
    length, width, rear = moment.vehicle
    front, side = length - rear, width / 2
    body = np.array([[front, side], [front, -side], [-rear, -side], [-rear, side]])
    cv2.fillPoly(view, [_fixed(PLAN.pixels(body))], (46, 160, 90), cv2.LINE_AA, _SHIFT)
    cv2.polylines(view, [_fixed(PLAN.pixels(body))], True, _INK, 2, cv2.LINE_AA, _SHIFT)
    if moment.driven is not None:
        _polyline(view, PLAN.pixels(moment.driven[:, :2]), DRIVEN, 3)
    return view


def _polyline(picture: Picture, pixels: Array, color: Color, thickness: int) -> None:
    """A line through points, with gaps where they are not finite."""
    for a, b in pairwise(pixels):
        if np.isfinite(a).all() and np.isfinite(b).all():
            (start, end) = _fixed(np.stack((a, b))).tolist()
            cv2.line(picture, start, end, color, thickness, cv2.LINE_AA, _SHIFT)


def _fixed(pixels: Array) -> NDArray[np.int32]:
    return np.round(pixels * (1 << _SHIFT)).astype(np.int32)


def _legend(draw: ImageDraw.ImageDraw, moment: Moment) -> None:
    x, y = 2 * CAMERA_SIZE[0] + 14, 10
    rows = [(f"planned by {moment.planner}", PLANNED)]
    if moment.driven is not None:
        rows.append(("ground truth: driven", DRIVEN))
    draw.rounded_rectangle((x - 6, y - 4, x + 262, y + 28 * len(rows) + 2), 6, fill=(18, 21, 26))
    for number, (text, color) in enumerate(rows):
        row = y + 28 * number
        draw.line((x + 4, row + 14, x + 36, row + 14), fill=color, width=10 if number == 0 else 4)
        draw.text((x + 46, row + 2), text, fill=_INK, font=_font(19))
    for ahead in range(20, int(PLAN.ahead_m), 20):
        row = round((PLAN.ahead_m - ahead) * PLAN.scale)
        draw.text(
            (WIDTH - 34, row), f"{ahead} m", fill=_INK, font=_font(17), anchor="rm", stroke_width=2, stroke_fill=0
        )


def _tag(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str) -> None:
    font = _font(20)
    left, top, right, bottom = draw.textbbox(at, text, font=font)
    draw.rounded_rectangle((left - 7, top - 5, right + 7, bottom + 5), 6, fill=(18, 21, 26))
    draw.text(at, text, fill=_INK, font=font)


def _words(draw: ImageDraw.ImageDraw, moment: Moment) -> None:
    """What the model says, what is true, and whether that is the same."""
    y = _TOP + 16
    draw.text((24, y), "The model says", fill=PLANNED, font=_font(19, bold=True))
    if moment.verdict is not None:
        text, good = moment.verdict
        text, color = (f"✓ {text}", _AGREES) if good else (f"✗ {text}", _DIFFERS)
        draw.text((2 * CAMERA_SIZE[0] - 24, y), text, fill=color, font=_font(21, bold=True), anchor="ra")
    y = _paragraph(draw, moment.said or "(nothing)", y + 28, _INK)
    if moment.truth is not None:
        draw.text((24, y + 6), "Ground truth", fill=DRIVEN, font=_font(19, bold=True))
        _paragraph(draw, moment.truth, y + 34, _INK)


def _paragraph(draw: ImageDraw.ImageDraw, text: str, y: int, color: Color) -> int:
    for line in textwrap.wrap(text, 76)[:2]:
        draw.text((24, y), line, fill=color, font=_font(30))
        y += 38
    return y


def _figures(draw: ImageDraw.ImageDraw, moment: Moment) -> None:
    x, y = 2 * CAMERA_SIZE[0] + 14, _TOP + 16
    rows = [("navigation", moment.navigation or "none"), *moment.figures]
    for number, (name, value) in enumerate(rows[:6]):
        row = y + 30 * number
        draw.text((x, row), name, fill=_DIM, font=_font(20))
        draw.text((x + 190, row), value, fill=_INK, font=_font(20))


def _strips(draw: ImageDraw.ImageDraw, moment: Moment) -> None:
    """Labels over time, one row each, with a mark at this moment."""
    bottom = HEIGHT - 14
    if moment.note:
        draw.text((24, bottom), moment.note, fill=_DIM, font=_font(17), anchor="ls")
        bottom -= 28
    if not moment.strips or moment.duration_s <= 0:
        return
    left, right, height = 150, WIDTH - 24, 24
    colors = strip_colors(moment.strips)
    top = bottom - len(moment.strips) * (height + 6)
    x = left
    for label, color in colors.items():
        draw.rectangle((x, top - 56, x + 16, top - 40), fill=color)
        draw.text((x + 23, top - 48), label, fill=_DIM, font=_font(17), anchor="lm")
        x += 42 + int(draw.textlength(label, font=_font(17)))
    for number, strip in enumerate(moment.strips):
        row = top + number * (height + 6)
        draw.text((24, row + height // 2), strip.name, fill=_DIM, font=_font(18), anchor="lm")
        draw.rectangle((left, row, right, row + height), fill=(30, 34, 40))
        for begin, end, label in strip.spans:
            a, b = (left + (right - left) * t / moment.duration_s for t in (begin, end))
            draw.rectangle((a, row, b, row + height), fill=colors[label])
    now = left + (right - left) * moment.time_s / moment.duration_s
    draw.line((now, top - 6, now, bottom - 4), fill=_INK, width=3)
    anchor = "rm" if now > WIDTH // 2 else "lm"
    draw.text((now + (-8 if anchor == "rm" else 8), top - 18), f"{moment.time_s:.1f} s", _INK, _font(18), anchor)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager  # takes half a second; brings the font that every machine has then

    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
    return ImageFont.truetype(path, size)
