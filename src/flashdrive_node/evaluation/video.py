"""A video of a replay, window by window: cameras, plan view of what was published and driven, and reasoning."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from flashdrive_node.evaluation.replay_report import DrivenPath
from flashdrive_node.runtime.bag import header_stamp_ns, messages, open_bag, raw_image, select
from flashdrive_node.runtime.decode import decode_image
from flashdrive_node.runtime.rig import Rig

Picture = NDArray[np.uint8]

WIDTH, HEIGHT = 1280, 720
_CAMERA = (440, 248)
_PLAN = (WIDTH - 2 * _CAMERA[0], 2 * _CAMERA[1])
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK, _DIM, _PAPER = (235, 235, 235), (150, 158, 166), (24, 28, 33)
_PLANNED, _DRIVEN = (90, 170, 255), (250, 250, 250)
#: Vehicle-frame window of the plan view: metres ahead, behind and to each side.
_AHEAD_M, _BEHIND_M = 78.0, 12.0


def write_video(
    path: Path, bag: Path, rig: Rig, records: Sequence[dict[str, Any]], driven: DrivenPath, notes: Sequence[str] = ()
) -> int:
    """Write an MP4 with one picture per published window, in real time.

    Args:
        path: The file to write; ends in .mp4.
        bag: The recording that was played.
        rig: Its rig.
        records: Published records, as the node wrote them.
        driven: Where the vehicle was.
        notes: What a viewer must know, shown at the bottom of every picture.

    Returns:
        Number of pictures.

    Raises:
        BagError: The recording cannot be read.
        OSError: No video can be written there.
    """
    ordered = sorted({r["t0_ns"]: r for r in records}.values(), key=lambda r: r["t0_ns"])
    if not ordered:
        raise OSError(f"{path}: a video needs published windows, there are none")
    gaps = np.diff([r["t0_ns"] for r in ordered]) / 1e9
    rate_hz = float(np.clip(1.0 / np.median(gaps), 1.0, 30.0)) if len(gaps) else 1.0
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate_hz, (WIDTH, HEIGHT))
    if not writer.isOpened():
        raise OSError(f"{path}: OpenCV cannot write an MP4 there")
    count = 0
    try:
        for record, images in _windows(bag, rig, ordered):
            writer.write(np.ascontiguousarray(compose(record, images, driven, rig, notes)[..., ::-1]))
            count += 1
    finally:
        writer.release()
    return count


def compose(
    record: dict[str, Any], images: dict[str, Picture], driven: DrivenPath, rig: Rig, notes: Sequence[str] = ()
) -> Picture:
    """One picture of the video: RGB uint8 [720, 1280, 3].

    Args:
        record: The record of the window.
        images: The image of each camera at t0 by name, RGB.
        driven: Where the vehicle was.
        rig: For names and the size of the vehicle.
        notes: Shown at the bottom.
    """
    canvas = np.full((HEIGHT, WIDTH, 3), _PAPER, np.uint8)
    for place, camera in enumerate(_arranged(rig)):
        x, y = (place % 2) * _CAMERA[0], (place // 2) * _CAMERA[1]
        image = images.get(camera)
        if image is not None:
            canvas[y : y + _CAMERA[1], x : x + _CAMERA[0]] = _fit(image)
        _text(canvas, camera, (x + 8, y + 18), 0.45)
    plan = _plan_view(record, driven, rig)
    canvas[: _PLAN[1], 2 * _CAMERA[0] :] = plan
    _text_panel(canvas, record, notes)
    return canvas


def _arranged(rig: Rig) -> list[str]:
    """Up to four cameras, the front ones on top."""
    by_index = {camera.index: camera.name for camera in rig.cameras}
    order = [i for i in (1, 6, 0, 2, 3, 4, 5) if i in by_index]
    return [by_index[i] for i in order[:4]]


def _windows(bag: Path, rig: Rig, records: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Picture]]]:
    """Each record with the images at its t0, in one pass over the bag; only needed images are decoded."""
    shown = set(_arranged(rig))
    wanted: dict[str, dict[int, int]] = {camera.topic: {} for camera in rig.cameras if camera.name in shown}
    names = {camera.topic: camera.name for camera in rig.cameras}
    topics = {camera.name: camera.topic for camera in rig.cameras}
    for number, record in enumerate(records):
        for name, stamps in record["frame_stamps_ns"].items():
            if name in shown:
                wanted[topics[name]][stamps[-1]] = number
    waiting: dict[int, dict[str, Picture]] = {}
    needed = [len(shown & record["frame_stamps_ns"].keys()) for record in records]
    turn = 0
    with open_bag(bag) as reader:
        connections = [c for c in select(reader, rig) if c.topic in wanted]
        for connection, _, raw in messages(reader, connections):
            message: Any = reader.deserialize(raw, connection.msgtype)
            stamp = header_stamp_ns(message)
            number = wanted[connection.topic].get(stamp, -1)
            if number < turn:
                continue
            image = decode_image(raw_image(message, connection.msgtype))
            waiting.setdefault(number, {})[names[connection.topic]] = _fit(image)
            while turn < len(records) and len(waiting.get(turn, {})) == needed[turn]:
                yield records[turn], waiting.pop(turn)
                turn += 1


def _fit(image: Picture) -> Picture:
    if image.shape[1::-1] == _CAMERA:
        return image
    return np.asarray(cv2.resize(image, _CAMERA, interpolation=cv2.INTER_AREA), np.uint8)


def _plan_view(record: dict[str, Any], driven: DrivenPath, rig: Rig) -> Picture:
    width, height = _PLAN
    view = np.full((height, width, 3), (34, 39, 46), np.uint8)
    scale = (height - 34) / (_AHEAD_M + _BEHIND_M)

    def pixels(xy: NDArray[np.float64]) -> NDArray[np.int32]:
        column = width / 2 - xy[:, 1] * scale
        row = height - 6 - (xy[:, 0] + _BEHIND_M) * scale
        return np.round(np.stack([column, row], axis=1) * 8).astype(np.int32)

    for ahead in range(0, int(_AHEAD_M), 20):
        radius = round(ahead * scale * 8)
        center = pixels(np.array([[0.0, 0.0]]))[0]
        cv2.circle(view, center.tolist(), radius, (58, 64, 72), 1, cv2.LINE_AA, 3)
        if ahead:
            row = int(center[1] / 8 - ahead * scale)
            _text(view, f"{ahead} m", (width - 46, row + 4), 0.38, _DIM)
    planned = np.concatenate([[[0.0, 0.0]], np.array(record["trajectory"]["xyz_m"])[:, :2]])
    actual = driven.future(record["t0_ns"])
    actual = np.concatenate([[[0.0, 0.0]], actual[~np.isnan(actual[:, 0])]])
    cv2.polylines(view, [pixels(planned)], False, _PLANNED, 5, cv2.LINE_AA, 3)
    cv2.polylines(view, [pixels(actual)], False, _DRIVEN, 1, cv2.LINE_AA, 3)
    back, front = -rig.rear_overhang_m, rig.vehicle_length_m - rig.rear_overhang_m
    side = rig.vehicle_width_m / 2
    outline = np.array([[front, side], [front, -side], [back, -side], [back, side]])
    cv2.polylines(view, [pixels(outline)], True, (120, 220, 140), 2, cv2.LINE_AA, 3)
    _text(view, "published", (10, 20), 0.45, _PLANNED)
    _text(view, "driven afterwards", (100, 20), 0.45, _DRIVEN)
    return view


def _text_panel(canvas: Picture, record: dict[str, Any], notes: Sequence[str]) -> None:
    top = 2 * _CAMERA[1]
    age_ms = (record["published_ns"] - record["t0_ns"]) / 1e6
    engine = (record.get("engine") or {}).get("name", "")
    facts = (
        f"window {record['window_id']}   speed {record['initial_speed_m_s']:.1f} m/s   "
        f"age when published {age_ms:.0f} ms   engine: {engine}"
    )
    _text(canvas, facts, (16, top + 28), 0.5, _DIM)
    if record["nav_text"]:
        _text(canvas, f"navigation: {record['nav_text']}", (16, top + 54), 0.55, (255, 214, 120))
    lines = textwrap.wrap(record["reasoning"], 96) or [""]
    for number, line in enumerate(lines[:4]):
        _text(canvas, line, (16, top + 84 + 26 * number), 0.62)
    for number, line in enumerate(textwrap.wrap(" ".join(notes), 165)[:2]):
        _text(canvas, line, (16, HEIGHT - 30 + 18 * number), 0.42, _DIM)


def _text(canvas: Picture, text: str, at: tuple[int, int], scale: float, color: tuple[int, int, int] = _INK) -> None:
    # OpenCV's fonts are ASCII only.
    plain = text.encode("ascii", "replace").decode("ascii")
    cv2.putText(canvas, plain, (at[0] + 1, at[1] + 1), _FONT, scale, (10, 10, 10), 1, cv2.LINE_AA)
    cv2.putText(canvas, plain, at, _FONT, scale, color, 1, cv2.LINE_AA)
