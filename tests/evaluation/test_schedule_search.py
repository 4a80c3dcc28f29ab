"""The schedule search: what is recorded, what is found in it, and how it is scored."""

import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdrive_node.cli.main import main
from flashdrive_node.engine.flow_schedule import FlowSchedule, integrate
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.clip import Clip, Truth, Window
from flashdrive_node.evaluation.flow_probe import FlowProbe, WindowFlow
from flashdrive_node.evaluation.random_drive import RandomDrive
from flashdrive_node.evaluation.schedule_report import figure_png, markdown
from flashdrive_node.evaluation.schedule_search import (
    SearchSettings,
    candidates,
    schedule_text,
    search,
    shortlist,
    velocity_change,
)
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.runtime import rig
from support.driven_bag import RIG, write_bag

CHECKPOINT = Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"
GREEDY = SamplingSettings(top_k=1, max_length=8)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_alpamayo(CHECKPOINT, "cpu", torch.float32)


@pytest.fixture(scope="module")
def drive(loaded) -> RandomDrive:
    return RandomDrive(loaded.model.config, (90, 160), (1,), 4)


@pytest.fixture(scope="module")
def flow(loaded, drive) -> WindowFlow:
    return FlowProbe(loaded, 2, GREEDY).window(drive.window(3), seed=5)


def test_probe_goes_the_engines_way(loaded, drive, flow):
    settings = PlainSettings("", device="cpu", precision="float32", samples=2, sampling=GREEDY, seed=5)
    expected = PlainEngine(settings, loaded).step(drive.window(3))
    steps = loaded.model.config.flow.num_inference_steps
    paths = flow.path(FlowSchedule.uniform(steps)).numpy()
    for sample, path in zip(expected.samples, paths, strict=True):
        np.testing.assert_allclose(path, sample.xyz, atol=1e-5)
    assert not np.allclose(paths[0], paths[1], atol=0.01)


def test_recorded_velocities_lead_to_the_same_end(flow):
    recorded = flow.velocities(6)
    assert recorded.shape == (2, 6, 64, 2)
    end = flow.noise + recorded.mean(dim=1)
    path = flow.model.action_space.to_path(end, torch.full((2,), flow.speed)).xyz
    torch.testing.assert_close(path, flow.path(FlowSchedule.uniform(6)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fill", ["hold", "linear"])
@pytest.mark.parametrize(("steps", "evaluations"), [(6, 3), (5, 1), (4, 4), (7, 2)])
def test_shortlist_is_that_of_integrating_all(steps, evaluations, fill):
    """With a field of the time alone, recorded velocities are what every schedule meets."""
    generator = torch.Generator().manual_seed(steps * 10 + evaluations)
    recorded = torch.randn(3, steps, 4, 2, generator=generator)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return recorded[:, round(float(t) * steps)]

    noise = torch.zeros(3, 4, 2)
    full = integrate(velocity, noise, FlowSchedule.uniform(steps).table()).action

    def displacement(chosen: tuple[int, ...]) -> float:
        end = integrate(velocity, noise, FlowSchedule.uniform(steps, (0, *chosen), fill).table()).action
        return float((end - full).square().mean().sqrt())

    every = sorted(itertools.combinations(range(1, steps), evaluations - 1), key=displacement)
    found = shortlist(recorded, evaluations, fill, count=4)
    assert [s.evaluated[1:] for s in found] == every[:4]
    assert {s.fill for s in found} == {fill}


def test_too_many_schedules_are_not_tried():
    recorded = torch.zeros(1, 20, 2, 2)
    assert shortlist(recorded, 9, "hold") == []
    names = candidates({20: recorded}, 9, 10)
    assert "least bound of 20, held" in names
    assert not any(name.startswith("search") for name in names)


def test_candidates_are_named_once_and_start_with_the_full_schedule():
    recorded = torch.randn(4, 8, 3, 2, generator=torch.Generator().manual_seed(0))
    found = candidates({8: recorded}, 4, 10)
    assert next(iter(found.items())) == ("all of 10", FlowSchedule.uniform(10))
    tables = [schedule.table().tolist() for schedule in found.values()]
    assert all(a != b for a, b in itertools.combinations(tables, 2))
    assert {schedule_text(s) for s in found.values()} >= {"10", "8", "4", "8:0,1,2,7", "10:0,2,4,6,8"}
    assert "evenly, of 8" not in found  # the same flow as 4 equal steps
    for schedule in found.values():
        assert FlowSchedule.parse(schedule_text(schedule)) == schedule


def test_change_of_the_velocity_by_hand():
    # Sizes 1, 1, 3 of one value: changes 0 and 2 against a root mean square of sqrt(11 / 3).
    change = velocity_change(torch.tensor([1.0, 1.0, 3.0]).view(1, 3, 1, 1).expand(5, 3, 4, 2))
    assert change.shape == (2, 3)
    assert change[:, 1].tolist() == pytest.approx([0, 2 / (11 / 3) ** 0.5])
    assert torch.equal(change[:, 0], change[:, 2])


class LateTurn(FlowProbe):
    """A flow whose velocity is the same up to the last eighth of the time, so that two evaluations of 8 tell all."""

    def window(self, observation, seed):
        generator = torch.Generator().manual_seed(seed)
        noise, early, late = torch.randn(3, 1, 64, 2, generator=generator).unbind()

        def velocity(x, t):
            return late if float(t) > 0.86 else early

        return WindowFlow(self.loaded.model, velocity, noise, 10.0)


@dataclass
class MadeUpClips:
    """Clips of made-up windows, with the straight path at 10 m/s as truth."""

    drive: RandomDrive
    lengths: tuple[int, ...]
    truth: bool = True
    name: str = "made-up"
    taken: list[tuple[str, int]] = field(default_factory=list)

    def __len__(self):
        return len(self.lengths)

    def clips(self):
        for k, length in enumerate(self.lengths):
            yield Clip(f"clip{k}", self.windows(k, length), [f"{length} windows"])

    def windows(self, k, length):
        xyz = np.zeros((64, 3), np.float32)
        xyz[:, 0] = np.arange(1, 65)
        for i in range(length):
            self.taken.append((f"clip{k}", i))
            yield Window(self.drive.window(i), Truth(xyz, np.zeros(64, np.float32)) if self.truth else None)


def test_search_finds_the_known_schedule(loaded, drive):
    source = MadeUpClips(drive, (5, 3, 4))
    settings = SearchSettings(evaluations=2, steps=(8,), limit=8, stride=2)
    result = search(LateTurn(loaded, 1, GREEDY), source, settings)
    # Windows 0, 2, 4 of the first clip, 0, 2 of the others: 7, every second of them scored.
    assert (result.searched, result.scored) == (4, 3)
    eight = next(s for s in result.scores if s.schedule == "8")
    best = result.best
    assert best.schedule == "8:0,7"
    # The checkpoint's own schedule has other steps; those of 8 find the same velocities as all of 8.
    assert best.deviation_m.mean == pytest.approx(eight.deviation_m.mean, rel=1e-3)
    assert best.deviation_m.clips == 3
    reference = result.scores[0]
    assert reference.deviation_m.mean == 0
    assert reference.ade_difference_m == (0, 0, 0, 3)
    for score in result.scores:
        assert score.deviation_m.low <= score.deviation_m.mean <= score.deviation_m.high
        assert score.ade_m.mean - reference.ade_m.mean == pytest.approx(score.ade_difference_m.mean, abs=1e-9)
        assert score.ade_difference_m.mean <= score.deviation_m.mean + 1e-6  # triangle inequality
    assert result.notes == ["clip0: 5 windows", "clip1: 3 windows", "clip2: 4 windows"]
    [rows] = result.velocity_change.values()
    assert np.array(rows)[:-1].max() == 0
    assert min(rows[-1]) > 0.5
    table = markdown(result)
    assert '`flow_schedule: "8:0,7"`' in table
    assert table.count("\n| ") == 1 + len(result.scores)  # the line under the head
    assert figure_png(result).startswith(b"\x89PNG")
    content = json.loads(json.dumps(result.as_dict()))
    assert content["best"] == "8:0,7"
    assert content["scores"][0]["deviation_m"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "clips": 3}


def test_windows_are_limited_and_truth_may_be_unknown(loaded, drive):
    source = MadeUpClips(drive, (6, 6), truth=False)
    result = search(LateTurn(loaded, 1, GREEDY), source, SearchSettings(evaluations=2, steps=(4,), limit=4, stride=1))
    assert (result.searched, result.scored) == (2, 2)
    assert source.taken == [("clip0", i) for i in (*range(5), *range(5))]  # the fifth only to see that it is too many
    assert result.scores[0].ade_m is None
    assert "| unknown | unknown |" in markdown(result)
    again = search(LateTurn(loaded, 1, GREEDY), source, result.settings)
    assert again.scores == result.scores
    other = search(LateTurn(loaded, 1, GREEDY), source, replace(result.settings, seed=1))
    assert other.scores != result.scores


@pytest.mark.parametrize(
    ("lengths", "message"), [((), "2 windows are required, found none"), ((1,), "2 windows are required, found 1")]
)
def test_too_few_windows(loaded, drive, lengths, message):
    settings = SearchSettings(evaluations=2, steps=(4,), limit=4, stride=1)
    with pytest.raises(InputError, match=message):
        search(LateTurn(loaded, 1, GREEDY), MadeUpClips(drive, lengths), settings)


def test_command_on_a_recording(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rig, "load_rig", lambda name: {"driven": RIG}[name])
    write_bag(tmp_path / "bag", 9.0)
    arguments = ["schedule", str(CHECKPOINT), "--bag", str(tmp_path / "bag"), "--rig", "driven", "--device", "cpu"]
    arguments += ["--evaluations", "2", "--steps", "4", "--limit", "2", "--stride", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--max-generation-length", "6"]) == 0
    content = json.loads((tmp_path / "schedule.json").read_text())
    assert (content["source"], content["searched"], content["scored"]) == ("bags bag", 1, 1)
    assert content["scores"][0]["ade_m"]["mean"] > 0
    assert (tmp_path / "schedule.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bag", "missing"], "a rosbag2 directory or file is required, found nothing there"),
        (["--bag", "missing", "--rig", "nothing"], "nothing"),
        ([], "one of --bag, --world and --physical-ai is required, found none"),
        (["--world", "train"], "--world: indices such as 17 or 0-199 are required, found ''"),
        (["--world", "moon:0-3"], "a split of"),
        (["--world", "train:0-3", "--evaluations", "9"], "found 9 of (8, 10)"),
        (["--world", "train:0-3", "--limit", "1"], "2 windows and a stride of 1 or more are required, found 1"),
    ],
)
def test_bad_requests_end_with_one_message(capsys, arguments, message):
    assert main(["schedule", str(CHECKPOINT), "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
