"""Running an engine over clips: pairing, resuming, partial results, figures by hand, and the files of a report."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashdrive_node.engine.protocol import EngineError, Observation, Prediction
from flashdrive_node.evaluation.clip import Clip, ClipError, Truth, Window
from flashdrive_node.evaluation.clip_scores import ClipScores
from flashdrive_node.evaluation.evaluation import ResultFolder, Shard, evaluate, seed_offset
from flashdrive_node.evaluation.evaluation_report import markdown, write_report
from flashdrive_node.evaluation.evaluation_summary import add_baseline, is_malformed, summarise
from flashdrive_node.model.errors import InputError
from support.windows import arc
from support.windows import delivery as delivery_of

SENTENCE = "Stop at the stop line because the traffic light is red."
OBSERVATION = delivery_of(Prediction(7, 0, (arc(8.0, 0.0),), 0, 8.0)).observation


class Source:
    """Clips of ten windows in which the vehicle drives straight on at 8 m/s."""

    name = "drives"

    def __init__(self, clips: int = 4, breaks_at: dict[str, int] | None = None):
        self.count, self.breaks_at = clips, breaks_at or {}

    def __len__(self) -> int:
        return self.count

    def clips(self) -> Iterator[Clip]:
        for number in range(self.count):
            yield Clip(f"drive-{number}", self._windows(f"drive-{number}"))

    def _windows(self, name: str) -> Iterator[Window]:
        driven = arc(8.0, 0.0)
        for number in range(10):
            if self.breaks_at.get(name) == number:
                raise ClipError("the file ends here")
            seen = Observation(
                number, number * 100_000_000, OBSERVATION.cameras, OBSERVATION.ego_history_xyz,
                OBSERVATION.ego_history_rot,
            )  # fmt: skip
            yield Window(seen, None if number == 9 else Truth(driven.xyz, driven.yaw, SENTENCE))


class Driver:
    """Plans at another speed, off by the same in every window; says what it is told; notes the seeds."""

    def __init__(self, speeds: tuple[float, ...] = (9.0, 8.5), text: str = SENTENCE, fails_at: int = -1):
        self.speeds, self.text, self.fails_at = speeds, text, fails_at
        self.windows = 0
        self.seeds: list[int] = []

    def reset(self, reason: str) -> None:
        self.windows = 0

    def step(self, observation: Observation) -> Prediction:
        self.seeds.append(self.windows)
        self.windows += 1
        if observation.window_id == self.fails_at:
            self.windows = 0
            raise EngineError("no answer")
        samples = tuple(arc(speed, 0.0, text=self.text) for speed in self.speeds)
        times = {"decode": 10.0 + observation.window_id, "total": 20.0}
        return Prediction(
            observation.window_id, observation.t0_ns, samples, len(samples) - 1, 8.0, times, {"accept_length": 3.2}
        )

    def load(self, progress: object = None) -> object: ...
    def warm_up(self, progress: object = None) -> None: ...
    def close(self) -> None: ...


SETTINGS = {"source": "drives", "seed": 0}


def run(path: Path, driver: Driver, source: Source | None = None, shard: Shard | None = None) -> list[ClipScores]:
    folder = ResultFolder(path)
    folder.prepare(SETTINGS)
    evaluate(driver, source or Source(), folder, shard)
    return folder.read()


def test_figures_by_hand(tmp_path: Path) -> None:
    clips = run(tmp_path, Driver())
    summary = summarise(SETTINGS, clips)
    assert (summary.clips, summary.windows, summary.scored, summary.problems) == (4, 40, 36, [])
    # 1 and 0.5 m/s too fast: half the distance on average, all of it at the end.
    for horizon in (1.0, 3.0, 5.0, 6.4):
        mean_s = (horizon + 0.1) / 2
        expected = {"ade": 0.75 * mean_s, "min_ade": 0.5 * mean_s, "fde": 0.75 * horizon, "driven_ade": 0.5 * mean_s}
        for name, value in expected.items():
            assert summary.errors[f"{name}@{horizon:g}s"].mean == pytest.approx(value, abs=1e-4)
    assert summary.errors["across@6.4s"].mean == 0
    shares = {name: estimate.mean for name, estimate in summary.texts.items()}
    # It says "stop" and does not.
    assert shares == {
        "empty": 0, "malformed": 0, "agree_with_path": 0, "readable": 1, "same_label": 1, "same_decision": 1,
    }  # fmt: skip
    assert summary.labels == {"RED_LIGHT": (1.0, 72)}
    assert summary.by_window["ade@6.4s"][0][0] == 0
    # From the fourth window of a clip on.
    assert (summary.latency_ms["decode"].count, summary.latency_ms["decode"].p50) == (28, 16.0)
    assert summary.metrics["accept_length"] == 3.2
    assert summary.accept_lengths == {"3": 40}


def test_every_window_has_its_own_seed_whoever_answers_it(tmp_path: Path) -> None:
    one, two, half = Driver(), Driver(fails_at=3), Driver()
    run(tmp_path / "one", one)
    run(tmp_path / "two", two)
    run(tmp_path / "half", half, shard=Shard(1, 2))
    assert one.seeds == two.seeds
    assert len(set(one.seeds)) == 40
    assert half.seeds == [*one.seeds[10:20], *one.seeds[30:40]]
    assert one.seeds[:2] == [seed_offset("drive-0"), seed_offset("drive-0") + 1]


def test_a_run_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    run(tmp_path, Driver(), shard=Shard(0, 2))
    rest = Driver()
    assert [clip.name for clip in run(tmp_path, rest)] == [f"drive-{i}" for i in range(4)]
    assert len(rest.seeds) == 20
    assert run(tmp_path, Driver()) == run(tmp_path / "at_once", Driver())


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    ResultFolder(tmp_path).prepare(SETTINGS)
    with pytest.raises(InputError, match=r"samples: 6 is required, found None\n  seed: 1 is required, found 0"):
        ResultFolder(tmp_path).prepare(SETTINGS | {"seed": 1, "samples": 6})


def test_clips_that_break_keep_what_they_have_and_are_tried_again(tmp_path: Path) -> None:
    clips = run(tmp_path, Driver(fails_at=2), Source(breaks_at={"drive-1": 4}))
    summary = summarise(SETTINGS, clips)
    assert summary.windows == 34
    assert summary.scored == 27
    assert "drive-1: after 4 window(s): the file ends here" in summary.problems
    assert "drive-0, window 2: no answer" in summary.problems
    again = Driver()
    retried = summarise(SETTINGS, run(tmp_path, again))
    assert len(again.seeds) == 10
    assert retried.windows == 40
    assert retried.problems == [f"drive-{i}, window 2: no answer" for i in (0, 2, 3)]


def test_paired_with_a_baseline(tmp_path: Path) -> None:
    clips = run(tmp_path / "a", Driver((9.0,)))[:3]
    baseline = run(tmp_path / "b", Driver((8.8,)))
    summary = summarise(SETTINGS, clips)
    add_baseline(summary, clips, "b", baseline)
    change = summary.compared["ade@6.4s"]
    assert change.relative.mean == pytest.approx(0.25, abs=1e-3)
    assert change.difference.mean == pytest.approx(0.2 * 3.25, abs=1e-3)
    assert change.difference.clips == 3
    assert "Change against b" in markdown(summary)
    with pytest.raises(InputError, match="windows that c has scored too"):
        add_baseline(summary, clips, "c", [])


def test_report_files(tmp_path: Path) -> None:
    clips = run(tmp_path, Driver(), Source(breaks_at={"drive-1": 4}))
    files = write_report(summarise(SETTINGS, clips), clips, tmp_path)
    assert [path.name for path in files] == ["evaluation.json", "evaluation.md", "evaluation.html"]
    content = json.loads(files[0].read_text())
    assert content["errors"]["ade@6.4s"][3] == 4
    page = files[2].read_text()
    # One summary plot, and paths and cameras of each worst window, all inside the page.
    assert page.count("data:image/png") == 5
    assert page.count("data:image/jpeg") == 4
    assert "src='http" not in page
    assert "the file ends here" in page
    assert "| ADE, one sample | 0.4" in files[1].read_text()


def test_a_path_that_is_not_finite_is_a_problem_and_no_figure(tmp_path: Path) -> None:
    clips = run(tmp_path, Driver((np.nan, 8.0)), Source(1))
    with pytest.raises(InputError, match=r"nothing was scored:\n.*window 0: the path has values that are not finite"):
        summarise(SETTINGS, clips)


def test_the_flow_of_some_windows_is_looked_at(tmp_path: Path) -> None:
    folder, seeds = ResultFolder(tmp_path), []

    def probe(observation: Observation, seed: int) -> list[float]:
        seeds.append(seed)
        return [0.4, 0.1, 0.1 * len(seeds)]

    folder.prepare(SETTINGS)
    evaluate(Driver(), Source(3), folder, probe=probe)
    assert seeds == [seed_offset(f"drive-{i}") for i in range(3)]
    summary = summarise(SETTINGS, folder.read())
    assert [row[1] for row in summary.velocity_change] == pytest.approx([0.4, 0.1, 0.2])
    assert summary.velocity_change[2] == pytest.approx([0.12, 0.2, 0.28])


def test_malformed_texts() -> None:
    assert not is_malformed("Keep lane.", True)
    assert is_malformed("Keep la", False)
    assert is_malformed("Keep <|im_end|> lane.", True)
    assert is_malformed("Keep � lane.", True)


def test_damaged_result_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clip.json"
    for content in ("", "[]", '{"version": 0}', '{"version": 1, "worst": null, "windows": [{"text": 1}]}'):
        path.write_text(content)
        with pytest.raises(InputError, match=r"clip\.json: not a clip's result"):
            ClipScores.read(path)


def test_shards() -> None:
    assert Shard.parse("1/4") == Shard(1, 4)
    for text in ("4/4", "1", "-1/2", "a/b"):
        with pytest.raises(InputError, match="INDEX/COUNT"):
            Shard.parse(text)
