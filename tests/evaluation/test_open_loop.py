"""Windows of the world, what policies plan in them, and the tables made of that."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation import open_loop_figure, open_loop_report
from flashdrive_node.evaluation.closed_loop import Observation
from flashdrive_node.evaluation.open_loop import OpenLoopWork, WindowRow, answer
from flashdrive_node.evaluation.open_loop_report import OpenLoopReport, figures
from flashdrive_node.evaluation.policies import Plans
from flashdrive_node.evaluation.world_windows import WindowChoice, WorldWindows, world_windows
from flashdrive_node.model.errors import InputError
from flashdrive_node.world.decision_text import forms_of, parse
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import record
from flashdrive_node.world.frames import FrameSettings, render_frames
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import select

CHOICE = WindowChoice("validation", steps=120, natural=2, balanced=10, seed=3)
INDICES = range(20, 50)


@pytest.fixture(scope="module")
def windows() -> WorldWindows:
    return world_windows(INDICES, CHOICE)


def test_windows_are_moments_of_the_experts_drives(windows: WorldWindows) -> None:
    episode = record(sample_scenes(scene_keys("validation", list(INDICES))), CHOICE.steps)
    seen = windows.observe(range(len(windows)), None)
    assert seen.images is None
    for i in range(0, len(windows), 7):
        step, row = windows.step[i], INDICES.index(windows.index[i])
        xyz, rot = episode.history(step)
        assert torch.equal(seen.history_xyz[i], xyz[row])
        assert torch.equal(seen.history_rot[i], rot[row])
        assert seen.navigation[i] == episode.navigation(step)[row]
        assert seen.speed[i] == episode.states[step].speed[row]
        assert torch.equal(windows.future_xy[i], episode.future(step)[0][row, :, :2])
        assert windows.sentences[i] == episode.sentences(step)[row]
        assert windows.decisions[i] == parse(windows.sentences[i])


def test_pictures_are_those_of_the_four_moments(windows: WorldWindows) -> None:
    frames = FrameSettings(width=32, height=16, chunk=2)
    images = windows.observe([4, 9], frames).images
    assert images is not None
    assert images.shape == (2, 4, 4, 16, 32, 3)
    rows = torch.tensor([4, 9])
    for frame in (0, 3):
        expected = render_frames(select(windows.scene, rows), select(windows.history[12 + frame], rows), frames)
        assert torch.equal(images[:, :, frame], expected)


def test_decisions_occur_as_often_as_they_do_or_all_alike(windows: WorldWindows) -> None:
    natural = Counter(i for i, flag in zip(windows.index, windows.natural, strict=True) if flag)
    assert set(natural.values()) == {CHOICE.natural}
    assert len(natural) >= len(INDICES) - 1
    balanced = Counter(d.label for d, flag in zip(windows.decisions, windows.balanced, strict=True) if flag)
    assert len(balanced) >= 10
    assert max(balanced.values()) == round(CHOICE.balanced * len(INDICES) / 100)
    # As few windows of a class from one scene as there can be.
    free = [
        i
        for i, d, flag in zip(windows.index, windows.decisions, windows.balanced, strict=True)
        if flag and d.label == "FREE"
    ]
    assert len(set(free)) == len(free)
    again = world_windows(INDICES, CHOICE)
    assert (again.index, again.step) == (windows.index, windows.step)
    other = world_windows(INDICES, WindowChoice("validation", steps=120, natural=2, balanced=10, seed=4))
    assert (other.index, other.step) != (windows.index, windows.step)


class Knowing:
    """Plans what was driven, moved aside by metres, and says what was true, or something else."""

    name = "knowing"
    sees = False

    def __init__(self, windows: WorldWindows, aside_m: float, texts: list[str]):
        self.windows, self.aside_m, self.texts = windows, aside_m, texts
        self.done = 0

    def begin(self) -> None: ...

    def plan(self, observation: Observation) -> Plans:
        count = len(observation.navigation)
        rows = slice(self.done, self.done + count)
        self.done += count
        truth = self.windows.future_xy[rows, None]
        aside = torch.tensor([0.0, self.aside_m])
        xy = torch.cat((truth + aside, truth - 2 * aside), dim=1)
        return Plans(xy, xy[..., 0], xy[..., 0], torch.zeros(count, dtype=torch.long), self.texts[rows])


def test_who_knows_the_truth_makes_no_error(windows: WorldWindows) -> None:
    rows = answer(Knowing(windows, 0.0, windows.sentences), windows, None, batch=16)
    assert len(rows) == len(windows)
    for row in rows:
        assert row.errors["ade@6.4s"] == row.errors["driven_fde@6.4s"] == 0.0
        assert row.cause_right
        assert row.decision_right
        assert row.stated == row.label


def test_errors_and_texts_are_told_apart(windows: WorldWindows) -> None:
    other = [forms_of(decision) for decision in windows.decisions]
    texts = [
        "",
        "Stop.",
        *(
            form[-1].format(who="car", side="left", lane="within the lane", coming="that is oncoming") + "."
            for form in other[2:]
        ),
    ]
    rows = answer(Knowing(windows, 0.5, texts), windows, None, batch=64)
    for row in rows:
        assert row.errors["ade@6.4s"] == pytest.approx(0.75, abs=1e-5)
        assert row.errors["min_ade@6.4s"] == pytest.approx(0.5, abs=1e-5)
        assert row.errors["driven_ade@6.4s"] == pytest.approx(0.5, abs=1e-5)
    assert [row.stated for row in rows[:2]] == [None, None]
    assert not rows[0].cause_right
    # Paraphrases of the truth.
    assert all(row.decision_right for row in rows[2:])
    shares = figures(rows)
    assert shares["malformed"].mean == pytest.approx(2 / len(rows))
    assert shares["empty"].mean == pytest.approx(1 / len(rows))
    assert shares["cause_right"].mean == pytest.approx(1 - 2 / len(rows))


def test_a_path_that_is_not_finite_counts_as_standing_still(windows: WorldWindows) -> None:
    class Broken(Knowing):
        def plan(self, observation: Observation) -> Plans:
            plans = super().plan(observation)
            plans.xy[:, 0, 5] = torch.nan
            return plans

    rows = answer(Broken(windows, 0.0, windows.sentences), windows, None, batch=len(windows))
    distance = windows.future_xy.norm(dim=-1).mean(dim=1)
    for row, metres in zip(rows, distance.tolist(), strict=True):
        assert row.errors["driven_ade@6.4s"] == pytest.approx(metres, rel=1e-4)


def row(index: int, label: str, error: float, stated: str | None, *, natural: bool = True) -> WindowRow:
    return WindowRow(
        "model", index, 20, natural, True, label, "s", {"ade@6.4s": error}, "t", stated, stated == label, False
    )


def test_tables_add_up() -> None:
    rows = [row(1, "LEAD", 1.0, "LEAD"), row(1, "LEAD", 2.0, "FREE", natural=False), row(2, "FREE", 6.0, None)]
    report = OpenLoopReport(CHOICE, {"model": rows}, {"checkpoint": "c"})
    assert report.sample("model", "natural")["ade@6.4s"].mean == 3.5
    assert report.sample("model", "balanced")["ade@6.4s"].mean == 3.0
    assert report.by_decision("model")["LEAD"]["cause_right"].mean == 0.5
    assert report.confusion("model") == {"FREE": {"none": 1}, "LEAD": {"LEAD": 1, "FREE": 1}}
    content = json.loads(json.dumps(open_loop_report.as_json(report)))
    assert content["policies"]["model"]["by_decision"]["FREE"]["ade@6.4s"]["mean"] == 6.0
    text = open_loop_report.markdown(report)
    assert "| lead | 2 | 1.50 | 50.0 | 0.0 |" in text
    assert "as they occur (2 windows)" in text
    assert open_loop_figure.figure_png(report).startswith(b"\x89PNG")


def test_policies_answer_the_same_windows() -> None:
    work = OpenLoopWork(("constant-velocity",), PlainSettings("none"), CHOICE)
    done: list[int] = []
    rows = work(list(range(6)), "cpu", done.append)
    assert sum(done) == work.total(range(6)) == 1
    assert {r.policy for r in rows} == {"constant-velocity"}
    assert all(r.text is None and r.cause_right is None for r in rows)
    assert np.mean([r.errors["ade@6.4s"] for r in rows]) > 1.0


@pytest.mark.parametrize("values", [{"steps": 79}, {"natural": -1}, {"natural": 0, "balanced": 0}])
def test_choices_without_windows_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(InputError, match="required, found"):
        WindowChoice(**values)


@pytest.mark.parametrize("policies", [(), ("expert",), ("constant-velocity", "expert")])
def test_the_expert_is_the_measure_and_no_policy(policies: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="policies that plan"):
        OpenLoopWork(policies, PlainSettings("none"))
