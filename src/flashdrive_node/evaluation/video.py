"""A video of a replay: what the cameras saw, and at each moment the newest result that was published by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.evaluation.bag_calibration import read_calibrations
from flashdrive_node.evaluation.bag_truth import read_truth
from flashdrive_node.evaluation.drive_picture import PLAN, Moment, View, draw_moment
from flashdrive_node.evaluation.mp4 import write_mp4
from flashdrive_node.evaluation.replay_report import DrivenPath, read_driven_path
from flashdrive_node.evaluation.strips import Strip, reasoning_strips
from flashdrive_node.evaluation.truth import Truth, compare
from flashdrive_node.runtime.bag import messages, open_bag, raw_image, select
from flashdrive_node.runtime.camera_model import CameraModel
from flashdrive_node.runtime.decode import decode_image
from flashdrive_node.runtime.rig import Rig

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]
#: Draws the world from above at a time; None where it cannot.
Ground = Callable[[int], Picture | None]

RATE_HZ = 10.0
#: Pictures that are drawn at once; the drawing runs outside of Python's lock.
_THREADS = 2
_PLAN_DT_NS = 100_000_000


@dataclass(frozen=True, eq=False)
class ReplayedDrive:
    """A recording with what the node published while it was played."""

    rig: Rig
    #: In order of publication.
    records: Sequence[dict[str, Any]]
    driven: DrivenPath
    calibrations: dict[str, CameraModel]
    truth: Truth | None
    ground: Ground
    #: Times of the first and the last picture, nanoseconds.
    start_ns: int
    end_ns: int
    strips: tuple[Strip, ...]
    note: str

    def newest(self, now_ns: int) -> dict[str, Any] | None:
        """The newest record that was published by a time."""
        done = [record for record in self.records if record["published_ns"] <= now_ns]
        return max(done, key=lambda record: record["t0_ns"], default=None)


def read_drive(
    bag: Path, rig: Rig, records: Sequence[dict[str, Any]], note: str = "", seconds: float | None = None
) -> ReplayedDrive:
    """Collect what a video needs, all but the pictures.

    Args:
        bag: The recording that was played.
        rig: Its rig.
        records: Published records, as the node wrote them.
        note: What a viewer must know, shown in every picture.
        seconds: How much of the recording was played, all of it by default.

    Raises:
        BagError: The recording cannot be read.
    """
    driven, truth = read_driven_path(bag, rig), read_truth(bag)
    start, end = int(driven.stamps_ns[0]), int(driven.stamps_ns[-1])
    if seconds is not None:
        end = min(end, start + round(seconds * 1e9))
    ordered = sorted(records, key=lambda record: record["published_ns"])
    strips = reasoning_strips(ordered, truth, start, end) if truth is not None else ()
    calibrations = read_calibrations(bag, rig)
    return ReplayedDrive(rig, ordered, driven, calibrations, truth, _ground(truth), start, end, strips, note)


def write_video(path: Path, bag: Path, drive: ReplayedDrive, on_progress: Callable[[int], object] | None = None) -> int:
    """Write an MP4 of the whole recording in real time.

    Args:
        path: The file to write; ends in .mp4.
        bag: The recording that was played.
        drive: `read_drive` of it.
        on_progress: Called with the number of pictures so far.

    Returns:
        Number of pictures.

    Raises:
        BagError: The recording cannot be read.
        OSError: No video can be written there, or the recording has no pictures.
    """

    def pictures() -> Iterator[Picture]:
        for count, picture in enumerate(draw_video(bag, drive), start=1):
            yield picture
            if on_progress is not None:
                on_progress(count)

    return write_mp4(path, RATE_HZ, pictures())


def draw_video(bag: Path, drive: ReplayedDrive) -> Iterator[Picture]:
    """The pictures of the video, RGB uint8 [1080, 1920, 3], `RATE_HZ` of them per second of the recording.

    Raises:
        BagError: The recording cannot be read.
    """
    sets = _camera_sets(bag, drive)
    with ThreadPoolExecutor(_THREADS) as pool:
        while batch := list(islice(sets, 2 * _THREADS)):
            yield from pool.map(lambda shown: draw_moment(moment_at(drive, *shown)), batch)


def moment_at(drive: ReplayedDrive, now_ns: int, pictures: dict[str, Picture]) -> Moment:
    """What is to be seen at a time.

    Args:
        drive: The drive.
        now_ns: The time, on the clock of the recording.
        pictures: The newest picture of each camera by name, RGB.
    """
    names = [name for name in _arranged(drive.rig) if name in pictures]
    record = drive.newest(now_ns)
    actual = drive.driven.future(now_ns)
    rig = drive.rig
    truth = drive.truth.at(record["t0_ns"] if record else now_ns) if drive.truth is not None else None
    return Moment(
        time_s=(now_ns - drive.start_ns) / 1e9,
        views=[View(name, pictures[name], drive.calibrations.get(name)) for name in names],
        planned=_planned(drive, record, now_ns) if record else np.zeros((0, 3)),
        driven=np.insert(actual[~np.isnan(actual[:, 0])], 2, 0.0, axis=1),
        said=record["reasoning"] if record else "(waiting for the first window)",
        truth=truth,
        verdict=_verdict(record["reasoning"], truth) if record else None,
        navigation=(record["nav_text"] or "") if record else "",
        figures=_figures(drive, record, now_ns),
        ground=drive.ground(now_ns),
        vehicle=(rig.vehicle_length_m, rig.vehicle_width_m, rig.rear_overhang_m),
        strips=drive.strips,
        duration_s=(drive.end_ns - drive.start_ns) / 1e9,
        note=drive.note,
    )


def _planned(drive: ReplayedDrive, record: dict[str, Any], now_ns: int) -> Array:
    """The part of a published path that lies ahead, [N, 3] in the vehicle frame of now."""
    path = np.array(record["trajectory"]["xyz_m"])
    times = record["t0_ns"] + _PLAN_DT_NS * np.arange(1, len(path) + 1)
    then, now = drive.driven.at(np.array([record["t0_ns"], now_ns]))
    world = path[:, :2] @ _turn(then[2]).T + then[:2]
    path = np.column_stack(((world - now[:2]) @ _turn(now[2]), path[:, 2]))
    return np.asarray(path[times > now_ns - _PLAN_DT_NS], np.float64)


def _turn(yaw: float) -> Array:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s], [s, c]])


def _figures(drive: ReplayedDrive, record: dict[str, Any] | None, now_ns: int) -> list[tuple[str, str]]:
    half_ns = _PLAN_DT_NS // 2
    ends = drive.driven.at(np.clip([now_ns - half_ns, now_ns + half_ns], drive.start_ns, drive.end_ns))
    shown_s = min(now_ns + half_ns, drive.end_ns) - max(now_ns - half_ns, drive.start_ns)
    figures = [("speed", f"{np.linalg.norm(ends[1, :2] - ends[0, :2]) / (shown_s / 1e9):.1f} m/s")]
    if record is None:
        return figures
    figures.append(("window", f"{record['window_id']}, {(now_ns - record['t0_ns']) / 1e9:.1f} s old"))
    figures.append(("engine", f"{record['timings_ms'].get('engine', 0.0):.0f} ms"))
    error = drive.driven.mean_error_m(record)
    if error is not None:
        figures.append(("path error", f"{error:.2f} m, mean over 6.4 s"))
    return figures


def _verdict(said: str, truth: str | None) -> tuple[str, bool] | None:
    found = compare(said, truth)
    if found is None:
        return None
    cause, decision, _ = found
    if decision:
        return "same decision", True
    return ("same cause, another pace", True) if cause else ("another decision", False)


def _ground(truth: Truth | None) -> Ground:
    """The world from above, built again from the scene that the recording names."""
    if truth is None:
        return lambda _: None
    from flashdrive_node.evaluation.plan_view import plan_view  # torch, which other recordings do not need
    from flashdrive_node.evaluation.world_bag import SceneChoice
    from flashdrive_node.world.scene import DT_S

    first, last = int(truth.stamps_ns[0]), int(truth.stamps_ns[-1])
    episode = SceneChoice(truth.split, truth.index, (last - first) / 1e9).drive()

    def draw(now_ns: int) -> Picture:
        step = int(np.clip(round((now_ns - first) / 1e9 / DT_S), 0, len(episode.states) - 1))
        return plan_view(episode.scene, episode.states[step], PLAN)

    return draw


def _arranged(rig: Rig) -> list[str]:
    """Up to four cameras, the front ones on top."""
    by_index = {camera.index: camera.name for camera in rig.cameras}
    order = [i for i in (1, 6, 0, 2, 3, 4, 5) if i in by_index]
    return [by_index[i] for i in order[:4]]


def _camera_sets(bag: Path, drive: ReplayedDrive) -> Iterator[tuple[int, dict[str, Picture]]]:
    """Time and newest pictures of the shown cameras, at every picture of the video."""
    shown = set(_arranged(drive.rig))
    names = {camera.topic: camera.name for camera in drive.rig.cameras if camera.name in shown}
    step_ns = round(1e9 / RATE_HZ)
    newest: dict[str, Any] = {}
    due = drive.start_ns
    with open_bag(bag) as reader:
        connections = [c for c in select(reader, drive.rig) if c.topic in names]
        for connection, _, raw in messages(reader, connections):
            message: Any = reader.deserialize(raw, connection.msgtype)
            newest[names[connection.topic]] = raw_image(message, connection.msgtype)
            stamps = [image.stamp_ns for image in newest.values()]
            # A set is whole when no camera lags behind the time that is due.
            if due <= drive.end_ns and len(newest) == len(shown) and min(stamps) >= due:
                yield due, {name: decode_image(image) for name, image in newest.items()}
                due += step_ns * (1 + (min(stamps) - due) // step_ns)
