"""Steps an engine through clips, one file of results per clip, so that a run can be interrupted, resumed and shared.

Every window draws with a seed of its clip's name and its place, so two configurations answer it with the same random
numbers, in whatever order and process the clips are done.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from tqdm import tqdm

from flashdrive_node.engine.protocol import Engine, EngineError, Observation
from flashdrive_node.evaluation.clip import Clip, ClipError, ClipSource
from flashdrive_node.evaluation.clip_scores import ClipScores, WindowScore, score, worst_window
from flashdrive_node.model.errors import InputError, ModelError

#: Later than this after the window before, a stream begins anew, as in the node.
GAP_NS = 1_000_000_000
#: Error that the worst windows are found by.
WORST = "ade@6.4s"
_PICTURE_PX = 320
#: Every so many windows of a clip the flow is looked at.
PROBED = 40
#: Given an observation and a seed, `relative_change` of the flow's velocity from step to step.
FlowChange = Callable[[Observation, int], list[float]]


class SeededEngine(Engine, Protocol):
    """An engine whose next window draws with its seed plus `windows`."""

    windows: int


@dataclass(frozen=True)
class Shard:
    """Every `of`-th clip from number `index` on."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``"0/4"``.

        Raises:
            InputError: The text is nothing of the kind.
        """
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            raise InputError(f"--shard: INDEX/COUNT such as 0/4 is required, found {text!r}")
        return cls(int(index), int(of))


class ResultFolder:
    """The results of one configuration over one source."""

    def __init__(self, path: Path):
        self.path = path
        self.clips = path / "clips"

    def prepare(self, settings: dict[str, Any]) -> None:
        """Begin a run, or go on with one of the same settings.

        Raises:
            InputError: The folder holds results of other settings; lists what differs.
        """
        self.clips.mkdir(parents=True, exist_ok=True)
        file, given = self.path / "settings.json", json.loads(json.dumps(settings))
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            differing = [
                f"{key}: {given.get(key)!r} is required, found {found.get(key)!r}"
                for key in sorted({*given, *found})
                if given.get(key) != found.get(key)
            ]
            if differing:
                raise InputError(f"{self.path} holds results of other settings:\n  " + "\n  ".join(differing))
        file.write_text(json.dumps(given, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """What the results were made with.

        Raises:
            InputError: There are none.
        """
        file = self.path / "settings.json"
        if not file.is_file():
            raise InputError(
                f"{self.path}: a folder that `flashdrive evaluate` wrote is required, found no {file.name}"
            )
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    def read(self) -> list[ClipScores]:
        """All clips done so far, in order of their names."""
        return [ClipScores.read(path) for path in sorted(self.clips.glob("*.json"))]

    def done(self, name: str) -> bool:
        """Whether a clip is through; one that ended in a problem is tried again."""
        path = self.clips / f"{name}.json"
        return path.is_file() and not ClipScores.read(path).problem


def evaluate(
    engine: SeededEngine,
    source: ClipSource,
    folder: ResultFolder,
    shard: Shard | None = None,
    probe: FlowChange | None = None,
) -> None:
    """Answer every window of every clip that is not done yet.

    Args:
        engine: Loaded and warm.
        source: The clips.
        folder: Takes a file per clip, prepared.
        shard: The part of the clips to do here; others may do the rest at the same time.
        probe: Asked how the flow goes in every `PROBED`-th window of a clip.
    """
    shard = shard or Shard()
    bar = tqdm(total=len(source) or None, desc=source.name, unit="clip")
    with bar:
        for number, clip in enumerate(source.clips()):
            bar.update()
            if number % shard.of == shard.index and not folder.done(clip.name):
                run_clip(engine, clip, folder, bar, probe).write(folder.clips / f"{clip.name}.json")


def run_clip(
    engine: SeededEngine, clip: Clip, folder: ResultFolder, bar: Any = None, probe: FlowChange | None = None
) -> ClipScores:
    """Answer one clip from its first window on; what was answered stays where the clip breaks off.

    Args:
        engine: Loaded; it is reset first.
        clip: Its windows are used up.
        folder: Takes the picture of the worst window.
        bar: A tqdm bar to show the window's number in.
        probe: As in `evaluate`.
    """
    result = ClipScores(clip.name)
    engine.reset("clip")
    engine.windows = seed_offset(clip.name)
    before_ns: int | None = None
    try:
        for index, window in enumerate(clip.windows):
            observation, truth = window.observation, window.truth
            if before_ns is not None and observation.t0_ns - before_ns > GAP_NS:
                engine.reset("gap")
                engine.windows = seed_offset(clip.name) + index
            before_ns = observation.t0_ns
            try:
                prediction = engine.step(observation)
            except EngineError as error:
                result.windows.append(WindowScore(index, observation.t0_ns, problem=str(error)))
                engine.windows = seed_offset(clip.name) + index + 1
                continue
            scored = score(index, prediction, truth)
            result.windows.append(scored)
            ade = scored.errors.get(WORST)
            if truth is not None and ade is not None and (result.worst is None or ade > result.worst.ade_m):
                result.worst = worst_window(index, ade, prediction, truth)
                write_picture(observation, folder.clips / f"{clip.name}.jpg")
            if probe is not None and index % PROBED == 0:
                result.velocity_change.append(probe(observation, seed_offset(clip.name) + index))
            if bar is not None:
                bar.set_postfix_str(f"{clip.name}, window {index}")
    except (ClipError, ModelError, OSError) as error:
        result.problem = f"after {len(result.windows)} window(s): {error}"
    result.notes = list(clip.notes)
    return result


def seed_offset(clip: str) -> int:
    """What is added to the seed in the first window of a clip: far from those of other clips, the same everywhere."""
    return zlib.crc32(clip.encode()) % 1_000_000 * 1000


def write_picture(observation: Observation, path: Path) -> None:
    """The newest frame of up to four cameras side by side, as a JPEG."""
    newest = [camera.images[-1] for camera in observation.cameras[:4]]
    pictures = [_resized(image) for image in newest]
    height = max(picture.shape[0] for picture in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0))) for p in pictures]
    joined = cv2.cvtColor(np.concatenate(padded, axis=1), cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", joined, [cv2.IMWRITE_JPEG_QUALITY, 80])
    if not done:
        raise OSError(f"{path}: the picture could not be encoded")
    path.write_bytes(data.tobytes())


def _resized(image: np.ndarray) -> np.ndarray:
    height = round(image.shape[0] * _PICTURE_PX / image.shape[1])
    return np.asarray(cv2.resize(image, (_PICTURE_PX, height), interpolation=cv2.INTER_AREA))
