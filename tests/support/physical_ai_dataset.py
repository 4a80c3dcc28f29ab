"""A small dataset in the layout of PhysicalAI-Autonomous-Vehicles: grey videos, and a vehicle on a circle."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path

import av
import numpy as np
import pandas as pd

CAMERAS = (
    "camera_cross_left_120fov",
    "camera_front_wide_120fov",
    "camera_cross_right_120fov",
    "camera_front_tele_30fov",
)
SPEED, TURN = 8.0, 0.1
#: Time of the first frame of each camera, microseconds, and the frames' spacing.
FIRST_US, FRAME_US = 2_000, 33_333


def shade(frame: int) -> int:
    """Grey level of a frame."""
    return 20 + 7 * (frame % 32)


def write_dataset(
    root: Path, clips: list[str], seconds: float = 20.5, motion_seconds: float | None = None, gap_at: int | None = None
) -> Path:
    """Write it; frames `gap_at` to `gap_at` + 6 are without a stamp of their own time."""
    rows = []
    for camera in CAMERAS:
        members = {
            "video": f"{{clip_id}}.{camera}.mp4",
            "frame_timestamps": f"{{clip_id}}.{camera}.timestamps.parquet",
        }
        rows.append((camera, "camera", f"camera/{camera}/{camera}.chunk_{{chunk_id:04d}}.zip", json.dumps(members)))
    members = {"egomotion": "{clip_id}.egomotion.parquet"}
    rows.append(("egomotion", "labels", "labels/egomotion/egomotion.chunk_{chunk_id:04d}.zip", json.dumps(members)))
    (root / "metadata").mkdir(parents=True)
    columns = ["feature", "directory", "chunk_path", "clip_files_in_zip"]
    pd.DataFrame(rows, columns=columns).to_csv(root / "features.csv", index=False)
    index = pd.Index(clips, name="clip_id")
    pd.DataFrame({"chunk": 0, "split": "train"}, index=index).to_parquet(root / "clip_index.parquet")
    names = [row[0] for row in rows]
    pd.DataFrame(dict.fromkeys(names, True), index=index).to_parquet(root / "metadata" / "feature_presence.parquet")
    pd.DataFrame({"country": "none"}, index=index).to_parquet(root / "metadata" / "data_collection.parquet")
    count = round(seconds * 30)
    stamps = FIRST_US + FRAME_US * np.arange(count)
    if gap_at is not None:
        stamps[gap_at:] += 6 * FRAME_US
    video = _video(count)
    for camera in CAMERAS:
        times = _parquet(pd.DataFrame({"timestamp": stamps}))
        files = {f"{c}.{camera}.mp4": video for c in clips} | {f"{c}.{camera}.timestamps.parquet": times for c in clips}
        _zip(root / "camera" / camera / f"{camera}.chunk_0000.zip", files)
    motion = _parquet(_motion(seconds if motion_seconds is None else motion_seconds))
    _zip(root / "labels" / "egomotion" / "egomotion.chunk_0000.zip", {f"{c}.egomotion.parquet": motion for c in clips})
    return root


def _motion(seconds: float) -> pd.DataFrame:
    times = np.arange(0, round(seconds * 1e6) + 1, 10_000)
    yaw = TURN * times / 1e6
    radius, zero = SPEED / TURN, np.zeros(len(times))
    columns = {"timestamp": times, "qx": zero, "qy": zero, "qz": np.sin(yaw / 2), "qw": np.cos(yaw / 2)}
    columns |= {"x": 40 + radius * np.sin(yaw), "y": radius * (1 - np.cos(yaw)), "z": zero + 1.5}
    columns |= {"vx": SPEED * np.cos(yaw), "vy": SPEED * np.sin(yaw), "vz": zero, "ax": zero, "ay": zero, "az": zero}
    return pd.DataFrame(columns | {"curvature": zero + 1 / radius})


def _video(frames: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 15
        stream.bit_rate = 4_000_000
        for number in range(frames):
            picture = np.full((48, 64, 3), shade(number), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _zip(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def newest_frame(time_us: int) -> int:
    """Number of the newest frame at a time."""
    return math.floor((time_us - FIRST_US) / FRAME_US)
