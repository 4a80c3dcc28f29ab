"""Which configurations are one function, and closed-loop figures by hand."""

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import pytest

from flashdrive_node.cli.clip_options import clip_source
from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.evaluation.ablation import DRIVES, LATENCY, SAME_AS, read_ablation
from flashdrive_node.evaluation.ablation_report import markdown, write_ablation
from flashdrive_node.evaluation.ablation_runs import PARTS, ConfiguredDrives, read_drives, same_as, write_drives
from flashdrive_node.evaluation.clip_scores import ClipScores, WindowScore
from flashdrive_node.evaluation.closed_loop_run import RunSettings, SceneRow
from flashdrive_node.evaluation.evaluation import ResultFolder
from flashdrive_node.evaluation.lockstep import LockstepWork
from flashdrive_node.model.errors import InputError, ModelError

PLAIN = PlainSettings("none", device="cpu")
STREAMING = StreamingSettings("none", device="cpu", stream=StreamSettings("features"))


def test_what_changes_no_answer_is_answered_once() -> None:
    kv, flow = StreamSettings("kv"), FlowSchedule.uniform(8, (0, 1, 2, 7))
    found = same_as(
        {
            "plain": PLAIN,
            "features": STREAMING,
            "drafted": replace(STREAMING, drafter=Path("d")),
            "shared": replace(STREAMING, shared_text=True),
            "kv": replace(STREAMING, stream=kv),
            "kv, drafted": replace(STREAMING, stream=kv, drafter=Path("d")),
            "refreshed": replace(STREAMING, stream=replace(kv, refresh_every=10)),
            "tuned": replace(STREAMING, stream=kv, overlay=Path("o")),
            "flow": replace(STREAMING, schedule=flow),
            "all": replace(STREAMING, stream=kv, overlay=Path("o"), schedule=flow),
        }
    )
    assert found == {
        "plain": "plain", "features": "plain", "drafted": "plain", "shared": "shared", "kv": "kv", "kv, drafted": "kv",
        "refreshed": "refreshed", "tuned": "tuned", "flow": "flow", "all": "all",
    }  # fmt: skip


def row(index: int, off_road: bool, progress: float) -> SceneRow:
    names = ("at_fault_collision", "red_light", "stop_sign")
    scores = dict.fromkeys(names, 0.0) | {"off_road": float(off_road)}
    return SceneRow(index, "CRUISE", scores, progress, 0.0 if off_road else progress, 1.0, texts=10, malformed=index)


def clip(name: str, ade_m: float, text: str = "Keep lane.") -> ClipScores:
    errors = {"ade@6.4s": ade_m, "min_ade@6.4s": ade_m / 2}
    times, figures = {"decode": 4.0, "total": 9.0}, {"accept_length": 5.0}
    windows = [WindowScore(i, i, errors, [text], [True], [None], None, times, figures) for i in range(12)]
    return ClipScores(name, windows)


def written(folder: Path) -> None:
    """Two functions and a third name of the first, over two clips and two scenes."""
    for name, same, apart in (("plain", "plain", 0.0), ("kv", "kv", 0.5), ("features", "plain", 0.0)):
        own, timed = ResultFolder(folder / name), ResultFolder(folder / LATENCY / name)
        for results in (own, timed):
            results.prepare({"source": "drives", SAME_AS: same})
        clip("one", 1.0 + apart, "Stop." if name == "kv" else "Keep lane.").write(timed.clips / "one.json")
        if same == name:
            for number, one in enumerate(("one", "two")):
                clip(one, 1.0 + number + apart).write(own.clips / f"{one}.json")
            driven = [row(1, off_road=name == "kv", progress=0.8), row(2, off_road=False, progress=1.0 - apart)]
            write_drives(folder / name / DRIVES, {"seconds": 20}, driven)


def test_figures_by_hand(tmp_path: Path) -> None:
    written(tmp_path)
    ablation = read_ablation(tmp_path, ["plain", "kv", "features"])
    kv, features = ablation.drives["kv"], ablation.drives["features"]
    assert kv.figures["scene_score"].mean == pytest.approx(0.25)
    assert kv.differences["scene_score"].mean == pytest.approx((0.0 + 0.5 - 0.8 - 1.0) / 2)
    assert kv.differences["off_road"].mean == 0.5
    assert kv.differences["red_light"].mean == 0
    assert kv.malformed == pytest.approx(3 / 20)
    assert features.differences["scene_score"].mean == 0
    assert ablation.drives["plain"].differences == {}
    assert ablation.summaries["kv"].compared["ade@6.4s"].relative.mean == pytest.approx(1 / 3)
    assert ablation.summaries["features"].metrics["accept_length"] == 5.0
    assert ablation.agreement["plain"] == (12, 1.0, 0.0)
    assert ablation.agreement["kv"] == (12, 0.0, 0.0)
    text = markdown(ablation)
    assert "| kv | 25.0 [0.0, 50.0]; -65.0 [-80.0, -50.0] |" in text
    assert "- kv: the engine itself, window by window, gives 0.0% of the texts" in text
    files = write_ablation(ablation, tmp_path)
    assert json.loads(files[0].read_text())["kv"]["closed_loop"]["differences"]["off_road"][0] == 0.5
    complete = cv2.imread(str(files[2])).shape
    for summary in ablation.summaries.values():
        summary.latency_ms = {}
    ablation.drives.clear()
    bare = cv2.imread(str(write_ablation(ablation, tmp_path)[2])).shape
    assert bare[:2] == (complete[0] // 2, complete[1])  # no room for what was not measured


def test_other_scenes_and_other_files_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    file = tmp_path / "kv" / DRIVES
    assert read_drives(file, {"seconds": 20}) == read_drives(file)
    assert read_drives(file, {"seconds": 10}) is None
    assert read_drives(tmp_path / "nothing.json") is None
    write_drives(file, {}, [row(1, off_road=False, progress=1.0)])
    with pytest.raises(InputError, match="scenes that the first configuration drove are required"):
        read_ablation(tmp_path, ["plain", "kv"])
    file.write_text("{}")
    with pytest.raises(InputError, match="not drives of an ablation"):
        read_drives(file)


def test_work_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    drives = ConfiguredDrives(
        {"kv": replace(STREAMING, stream=StreamSettings("kv"))}, RunSettings(seconds=2.0), (288, 160), {"kv": {}}, {}
    )
    works = [LockstepWork({"plain": (PLAIN, tmp_path)}, partial(clip_source, None), 8), drives]
    assert [pickle.loads(pickle.dumps(work)) for work in works][1] == works[1]
    assert [work.total(range(3)) for work in works] == [3, 20]


def test_drives_that_are_done_are_not_driven_again(tmp_path: Path) -> None:
    """A checkpoint that does not exist would be noticed."""
    described = {"scenes": 3}
    settings = RunSettings(seconds=2.0, batch=2)
    work = ConfiguredDrives({"kv": STREAMING}, settings, (288, 160), {"kv": described}, {"kv": tmp_path / "kv"})
    rows = [row(index, off_road=index == 5, progress=0.5) for index in (4, 5, 6)]
    parts = tmp_path / "kv" / PARTS
    parts.mkdir(parents=True)
    write_drives(parts / "4-5.json", described, rows[:2])
    write_drives(parts / "6-6.json", described, rows[2:])
    steps: list[int] = []
    assert work([4, 5, 6], "cpu", steps.append) == [("kv", one) for one in rows]
    assert steps == [20, 20]
    write_drives(parts / "6-6.json", {"scenes": 2}, rows[2:])
    with pytest.raises(ModelError, match="none"):
        work([4, 5, 6], "cpu", steps.append)
