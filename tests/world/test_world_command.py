"""``flashdrive world`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from flashdrive_node.cli.main import main


def test_sheet_has_a_row_per_scenario(tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "sheet.png"
    command = ["world", "sheet", str(out), "--scenarios", "curve", "red_light", "--size", "64x32", "--samples", "1"]
    assert main(command) == 0
    picture = cv2.imread(str(out))
    assert picture.shape == (2 * (32 + 18), 4 * 64, 3)
    # Captions have letters, pictures have sky and road.
    assert picture[:18].max() > 150
    assert picture[18:50].std() > 20


def test_stats_counts_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "stats.json"
    assert main(["world", "stats", "--scenes", "40", "--seconds", "4", "--filtered", "--json", str(report)]) == 0
    counts = json.loads(report.read_text())
    assert 35 <= counts["scenes"] <= 40
    assert counts["faults"] == dict.fromkeys(counts["faults"], 0)
    assert sum(counts["cause_s"].values()) == pytest.approx(4.0 * counts["scenes"])
    assert f"{counts['scenes']} scenes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sheet", "a.png", "--size", "big"], "WIDTHxHEIGHT is required"),
        (["sheet", "a.png", "--size", "60x32"], "multiple of 8"),
        (["sheet", "a.gif"], "ends in .png or .jpg"),
        (["sheet", "a.png", "--samples", "0"], "at least 1"),
        (["stats", "--scenes", "0"], "must be positive"),
    ],
)
def test_bad_arguments_are_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["world", *arguments]) == 2
    assert message in capsys.readouterr().err
