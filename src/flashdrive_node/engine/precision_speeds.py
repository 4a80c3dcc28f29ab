"""What was measured of the presets' speed: rows of ``data/precision_speeds.json``."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flashdrive_node.model.errors import ConfigError
from flashdrive_node.model.precision import PRESETS

#: The table that comes with the package.
TABLE = Path(__file__).parents[1] / "data" / "precision_speeds.json"


@dataclass(frozen=True)
class MeasuredSpeed:
    """One preset on one card."""

    #: Of the card, such as "9.0", and its name.
    capability: str
    device: str
    #: Width of the model's text layers; speeds of one model say nothing about another size.
    hidden_size: int
    samples: int
    preset: str
    #: Median time of a window, ms.
    window_ms: float
    #: How and when it was measured.
    source: str


def read_speeds(path: Path = TABLE) -> list[MeasuredSpeed]:
    """The rows of a table.

    Raises:
        ConfigError: Not such a table; lists every bad row.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ConfigError(str(path), [f"an object with a list 'rows' is required, found {content!r:.60}"])
    problems = [f"row {number}: {problem}" for number, row in enumerate(rows) if (problem := _problem(row))]
    if problems:
        raise ConfigError(str(path), problems)
    return [MeasuredSpeed(**row) for row in rows]


def _problem(row: Any) -> str:
    """What is wrong with a row, or nothing."""
    types = {"hidden_size": (int,), "samples": (int,), "window_ms": (int, float)}
    names = [field.name for field in fields(MeasuredSpeed)]
    if not isinstance(row, Mapping) or sorted(row) != sorted(names):
        return f"keys {', '.join(names)} are required, found {row!r:.80}"
    for name in names:
        allowed = types.get(name, (str,))
        if not isinstance(row[name], allowed) or isinstance(row[name], bool):
            return f"key {name!r} must be a {allowed[-1].__name__}, found {row[name]!r}"
    if row["preset"] not in PRESETS or not row["window_ms"] > 0:
        return f"a preset of {', '.join(PRESETS)} and a time above 0 are required, found {row!r:.120}"
    return ""


def times_of(
    speeds: Sequence[MeasuredSpeed], capability: str, hidden_size: int, samples: int, presets: Collection[str]
) -> dict[str, MeasuredSpeed]:
    """Rows that can be compared: of such a card and model, all with one number of samples, the nearest that is there.

    Returns:
        By preset, of those that are asked for; empty where not two of them were measured alike.
    """
    rows = [r for r in speeds if (r.capability, r.hidden_size) == (capability, hidden_size) and r.preset in presets]
    for count in sorted({row.samples for row in rows}, key=lambda count: abs(count - samples)):
        found = {row.preset: row for row in rows if row.samples == count}
        if len(found) > 1:
            return found
    return {}
