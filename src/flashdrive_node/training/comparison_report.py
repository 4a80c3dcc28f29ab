"""A comparison of drafters as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from flashdrive_node.training.draft_attention import LOOKED_AT

_HEAD = (
    "", "accept length", "first, at start", "first, later", "routine share", "on history", "on images", "decode ms",
    "tokens/s", "at changes", "elsewhere", "p", "by AARL", "path, m",
)  # fmt: skip


def write_comparison(directory: Path, conditions: Mapping[str, Any], rows: Mapping[str, dict[str, Any]]) -> str:
    """Write ``comparison.json``, ``.md`` and ``.png``, and return the table."""
    content = {"conditions": dict(conditions), "drafters": dict(rows)}
    (directory / "comparison.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = table(rows)
    (directory / "comparison.md").write_text(text + "\n", encoding="utf-8")
    draw(rows, directory / "comparison.png")
    return text


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """Markdown; shares of attention are those of the guesses, "at changes" and "elsewhere" of deliberative tokens.

    "by AARL" is the paired change of the accept length, and "path" what the path with unverified drafts gains.
    """
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + " --- |" * len(_HEAD)]
    for name, row in rows.items():
        a, thought = row["acceptance"], row["deliberation"]
        attention, timing, aarl = row.get("attention"), row.get("timing"), row.get("aarl")
        cells = [
            name,
            _interval(a["accept_length"], 2),
            f"{a['first_at_start']:.1%}",
            f"{a['first_later']:.1%}",
            _interval(a["routine_share"], 3),
            _percent(attention and attention["history"]),
            _percent(attention and attention["images"]),
            f"{timing['decode_ms']:.1f}" if timing else "",
            f"{timing['tokens_per_s']:.0f}" if timing else "",
            _percent(thought["share_at_changes"]),
            _percent(thought["share_elsewhere"]),
            "" if thought["p_value"] is None else f"{thought['p_value']:.4f}",
            _interval(aarl["gained"], 2) if aarl else "",
            _interval(aarl["after"]["test"]["gain_m"], 3) if aarl else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = next(iter(rows.values()))["acceptance"]
    clips = first["accept_length"][3]
    return "\n".join([*lines, "", f"{first['texts']} texts of {clips} clips; intervals over clips."])


def draw(rows: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Accept lengths with their intervals, and where each drafter looks."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.45 * len(rows) + 1.6), layout="constrained", sharey=True)
    names = list(rows)
    for place, row in enumerate(rows.values()):
        mean, low, high, _ = row["acceptance"]["accept_length"]
        left.barh(place, mean, color="#8aa7c4")
        left.plot((low, high), (place, place), color="#2b2b2b", linewidth=1.6)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("accept length, tokens per pass")
    colours = ("#c63a3a", "#3a7d44", "#d9a441", "#7b6fb0", "#8aa7c4", "#d0d0d0")
    for place, row in enumerate(rows.values()):
        start = 0.0
        for part, colour in zip(LOOKED_AT, colours, strict=True):
            share = row.get("attention", {}).get(part, 0.0)
            right.barh(place, share, left=start, color=colour, label=part if place == len(rows) - 1 else None)
            start += share
    right.set_xlabel("share of attention")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _interval(estimate: Any, digits: int) -> str:
    mean, low, high, _ = estimate
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
