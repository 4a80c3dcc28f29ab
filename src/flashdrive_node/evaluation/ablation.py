"""What each shortcut costs and gains: configurations side by side, each paired with the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flashdrive_node.evaluation.ablation_runs import read_drives
from flashdrive_node.evaluation.clip_scores import ClipScores
from flashdrive_node.evaluation.closed_loop_run import SceneRow
from flashdrive_node.evaluation.evaluation import WORST, ResultFolder
from flashdrive_node.evaluation.evaluation_summary import Summary, add_baseline, summarise
from flashdrive_node.evaluation.metrics import Estimate, bootstrap_mean
from flashdrive_node.model.errors import InputError

#: Folder of the windows that the engines themselves have answered, and file of a configuration's drives.
LATENCY, DRIVES = "latency", "closed_loop.json"
#: Key of a configuration's settings that names the one with the same function.
SAME_AS = "same_as"
#: Figures of the closed loop, and what they are called.
CLOSED_LOOP = {
    "scene_score": "scene score",
    "progress": "progress",
    "at_fault_collision": "at-fault collision",
    "off_road": "off-road",
    "red_light": "red light",
    "stop_sign": "stop line",
}


class Drives(NamedTuple):
    """Figures of the closed loop over scenes, shares from 0 to 1."""

    figures: dict[str, Estimate]
    #: Differences to the first configuration on the same scenes; empty for itself.
    differences: dict[str, Estimate]
    #: Share of the texts that the world's grammar could not have made.
    malformed: float


class Agreement(NamedTuple):
    """The engine itself against the same function over many clips at a time, on the same windows."""

    windows: int
    #: Share of the texts that are equal, and mean size of the difference of the ADE, metres.
    texts: float
    ade_m: float


@dataclass(frozen=True)
class Ablation:
    """Summaries by the configurations' names; the first is what the others are compared with."""

    summaries: dict[str, Summary]
    drives: dict[str, Drives] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)

    def to_json(self) -> str:
        """Indented JSON; estimates are lists of mean, low, high, clips."""
        content: dict[str, Any] = {}
        for name, summary in self.summaries.items():
            content[name] = asdict(summary)
            if name in self.drives:
                content[name]["closed_loop"] = self.drives[name]._asdict()
            if name in self.agreement:
                content[name]["engine_agrees"] = self.agreement[name]._asdict()
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def read_ablation(folder: Path, names: Sequence[str]) -> Ablation:
    """Put together what there is of some configurations.

    Args:
        folder: Holds a result folder per name.
        names: The first is the baseline.

    Raises:
        InputError: A configuration has no results, or none on the windows of the baseline.
    """
    settings = {name: ResultFolder(folder / name).settings() for name in names}
    source = {name: settings[name].get(SAME_AS, name) for name in names}
    clips = {name: ResultFolder(folder / name).read() for name in dict.fromkeys(source.values())}
    result = Ablation({name: summarise(settings[name], clips[source[name]]) for name in names})
    first = names[0]
    rows = {name: read_drives(folder / source[name] / DRIVES) for name in names}
    for name in names:
        summary = result.summaries[name]
        if name != first:
            add_baseline(summary, clips[source[name]], first, clips[source[first]])
        measured = ResultFolder(folder / LATENCY / name).read()
        if measured:
            engine = summarise(settings[name], measured)
            summary.latency_ms, summary.metrics = engine.latency_ms, engine.metrics
            summary.accept_lengths = engine.accept_lengths
            summary.problems += [f"engine: {problem}" for problem in engine.problems]
            if settings[name].get("temperature", 0) == 0:
                result.agreement[name] = agreement(measured, clips[source[name]])
        if (own := rows[name]) is not None:
            result.drives[name] = drives(own, rows[first] if name != first else None)
    return result


def drives(rows: Sequence[SceneRow], baseline: Sequence[SceneRow] | None) -> Drives:
    """Figures over scenes, and their paired differences.

    Raises:
        InputError: The baseline drove other scenes.
    """
    differences: dict[str, Estimate] = {}
    if baseline is not None:
        if [row.index for row in rows] != [row.index for row in baseline]:
            raise InputError(f"{len(rows)} scenes that the first configuration drove are required, found others")
        for name in CLOSED_LOOP:
            pairs = zip(rows, baseline, strict=True)
            differences[name] = bootstrap_mean([a.figure(name) - b.figure(name) for a, b in pairs])
    texts = sum(row.texts for row in rows)
    figures = {name: bootstrap_mean([row.figure(name) for row in rows]) for name in CLOSED_LOOP}
    return Drives(figures, differences, sum(row.malformed for row in rows) / max(texts, 1))


def agreement(engine: Sequence[ClipScores], lockstep: Sequence[ClipScores]) -> Agreement:
    """Compare windows that both have scored.

    Raises:
        InputError: There are none.
    """
    other = {(clip.name, w.index): w for clip in lockstep for w in clip.windows if w.errors}
    pairs = [
        (w, other[clip.name, w.index])
        for clip in engine
        for w in clip.windows
        if w.errors and (clip.name, w.index) in other
    ]
    if not pairs:
        raise InputError("windows that the engine and its function side by side have scored are required, found none")
    texts = np.mean([a == b for one, two in pairs for a, b in zip(one.texts, two.texts, strict=True)])
    apart = np.mean([abs(one.errors[WORST] - two.errors[WORST]) for one, two in pairs])
    return Agreement(len(pairs), round(float(texts), 5), round(float(apart), 5))
