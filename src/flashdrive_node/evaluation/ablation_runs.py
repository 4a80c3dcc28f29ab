"""What an ablation runs: which configurations are one function, and drives of each in closed loop."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.evaluation.closed_loop_run import ClosedLoopWork, RunSettings, SceneRow
from flashdrive_node.evaluation.devices import Progress
from flashdrive_node.evaluation.policies import MODEL, weights_of
from flashdrive_node.model.errors import InputError

#: Folder of a configuration's drives of some scenes.
PARTS = "closed_loop.parts"


def function_of(settings: PlainSettings) -> Hashable:
    """Equal for settings that answer alike: features that are kept and guesses that are checked change nothing.

    Checked guesses give the same texts at greedy, and draw from the same distribution otherwise.
    """
    if not isinstance(settings, StreamingSettings):
        return weights_of(settings), None, None, False
    stream = settings.stream if settings.stream.mode == "kv" else None
    return weights_of(settings), stream, settings.schedule, settings.shared_text


def same_as(configurations: Mapping[str, PlainSettings]) -> dict[str, str]:
    """By name the first configuration of the same function."""
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(function_of(settings), name) for name, settings in configurations.items()}


@dataclass(frozen=True)
class ConfiguredDrives:
    """Closed loop of several configurations, for `devices.spread`."""

    configurations: Mapping[str, PlainSettings]
    run: RunSettings
    #: Width and height of the pictures.
    size: tuple[int, int]
    #: Per configuration what its drives depend on, and the folder that takes those of some scenes when they are done,
    #: so that a run that is cut goes on behind them.
    described: Mapping[str, Mapping[str, Any]]
    folders: Mapping[str, Path]

    def _work(self, name: str) -> ClosedLoopWork:
        # One plan is driven, and so one is made.
        return ClosedLoopWork((MODEL,), replace(self.configurations[name], samples=1), self.run, self.size)

    def total(self, indices: Sequence[int]) -> int:
        """Steps of all configurations."""
        return sum(self._work(name).total(indices) for name in self.configurations)

    def __call__(self, indices: Sequence[int], device: str, progress: Progress) -> list[tuple[str, SceneRow]]:
        """Name of the configuration and a row, for every configuration and scene."""
        return [(name, row) for name in self.configurations for row in self._driven(name, indices, device, progress)]

    def _driven(self, name: str, indices: Sequence[int], device: str, progress: Progress) -> list[SceneRow]:
        rows: list[SceneRow] = []
        for first in range(0, len(indices), self.run.batch):
            rows += self._driven_together(name, indices[first : first + self.run.batch], device, progress)
        return rows

    def _driven_together(self, name: str, indices: Sequence[int], device: str, progress: Progress) -> list[SceneRow]:
        described, work = self.described[name], self._work(name)
        path = self.folders[name] / PARTS / f"{indices[0]}-{indices[-1]}.json"
        rows = read_drives(path, described)
        if rows is not None:
            progress(work.total(indices))
            return rows
        rows = [row for _, row in work(indices, device, progress)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_drives(path, described, rows)
        return rows


def write_drives(path: Path, settings: Mapping[str, Any], rows: Sequence[SceneRow]) -> None:
    """Write one configuration's drives, complete or not at all."""
    partial = path.with_suffix(".partial")
    content = {"settings": settings, "scenes": [asdict(row) for row in rows]}
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)


def read_drives(path: Path, settings: Mapping[str, Any] | None = None) -> list[SceneRow] | None:
    """Drives of one configuration, None where there are none or, where settings are given, none of these.

    Raises:
        InputError: The file holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if settings is not None and content["settings"] != json.loads(json.dumps(settings)):
            return None
        return [SceneRow(**row) for row in content["scenes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not drives of an ablation: {type(error).__name__}: {error}") from error
