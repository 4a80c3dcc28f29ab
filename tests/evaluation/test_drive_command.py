"""`flashdrive drive` with a tiny model: who plans what, tables, files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch

from flashdrive_node.cli.main import main
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.evaluation.ablation_runs import ConfiguredDrives
from flashdrive_node.evaluation.closed_loop import Observation
from flashdrive_node.evaluation.closed_loop_run import ClosedLoopWork, RunSettings
from flashdrive_node.evaluation.history_baseline import FILE_NAME, HistoryBaseline
from flashdrive_node.evaluation.policies import ConstantVelocity, make_policy, medoid
from flashdrive_node.model.action_space import yaw_matrix
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.training.architecture import alpamayo_small
from flashdrive_node.training.initial_weights import new_model
from flashdrive_node.training.vocabulary import build_tokenizer
from support.tiny_dimensions import TINY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = alpamayo_small(build_tokenizer(folder / "tokenizer"), **TINY)
    model = new_model(config, torch.device("cpu"), torch.float32, seed=0)
    out = save_checkpoint(model, config, folder / "checkpoint", tokenizer_files_dir=folder / "tokenizer")
    torch.manual_seed(0)
    HistoryBaseline(config.action_space, hidden=16).save(out / FILE_NAME)
    return out


def settings(checkpoint: Path, samples: int = 1) -> PlainSettings:
    sampling = SamplingSettings(temperature=0.0, max_length=4)
    return PlainSettings(str(checkpoint), device="cpu", samples=samples, sampling=sampling, flow_steps=1)


@pytest.fixture
def observation() -> Observation:
    """Three vehicles, straight on at 6 m/s, in a bend at 8 m/s, and standing."""
    back = torch.arange(-15, 1) * 0.1
    speed, bend = torch.tensor([6.0, 8.0, 0.0]), torch.tensor([0.0, 0.01, 0.0])
    along = speed[:, None] * back
    xyz = torch.stack((along, 0.5 * bend[:, None] * along**2, torch.zeros_like(along)), dim=2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 4, 4, 32, 64, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, xyz, yaw_matrix(bend[:, None] * along), [None, "Turn left in 30m", None], speed.double())


def test_constant_velocity_goes_straight_on(observation: Observation) -> None:
    xy, yaw, speed = ConstantVelocity().plan(observation).driven()
    assert torch.allclose(xy[:, -1, 0], 6.4 * observation.speed.float())
    assert torch.allclose(xy[:, 0, 0], 0.1 * observation.speed.float())
    assert not xy[..., 1].any()
    assert not yaw.any()
    assert torch.equal(speed, observation.speed.float()[:, None].expand(-1, 64))


def test_the_history_baseline_plans_as_its_network_says(checkpoint: Path, observation: Observation) -> None:
    policy = make_policy("history", settings(checkpoint), batch=2)
    assert policy is not None
    plans = policy.plan(observation)
    path = policy.baseline.plan(observation.history_xyz, observation.history_rot, observation.navigation)
    assert torch.equal(plans.xy[:, 0], path.xyz[..., :2])
    assert torch.equal(plans.speed[:, 0], path.speed)
    assert plans.texts is None


def test_the_model_is_given_some_scenes_at_a_time(checkpoint: Path, observation: Observation) -> None:
    policy = make_policy("model", settings(checkpoint, samples=3), batch=2)
    assert policy is not None
    asked = []

    def plan(images: torch.Tensor, *rest: object) -> object:
        asked.append(len(images))
        return whole(images, *rest)

    whole = policy.policy.plan
    policy.policy.plan = plan
    plans = policy.plan(observation)
    assert asked == [2, 1]
    assert plans.xy.shape == (3, 3, 64, 2)
    assert plans.yaw.shape == plans.speed.shape == (3, 3, 64)
    assert plans.texts is not None
    assert len(plans.texts) == 3
    driven = plans.driven()[0]
    for row, sample in enumerate(plans.chosen.tolist()):
        assert torch.equal(driven[row], plans.xy[row, sample])
    with pytest.raises(InputError, match="needs pictures"):
        policy.plan(observation._replace(images=None))


def test_the_middle_sample_is_driven() -> None:
    ends = torch.tensor([[0.0, 1.0, 1.2, 5.0], [3.0, 3.0, 9.0, 2.9]])
    xy = ends[:, :, None, None] * torch.linspace(0, 1, 64)[:, None] * torch.tensor([0.0, 1.0])
    assert medoid(xy).tolist() == [1, 0]
    xy[0, 1, 7, 0] = torch.nan
    assert medoid(xy).tolist() == [2, 0]
    assert medoid(torch.full((1, 2, 64, 2), torch.nan)).tolist() == [0]


def test_policies_that_there_are_not(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="a policy of model, history"):
        make_policy("oracle", settings(checkpoint), 1)
    with pytest.raises(InputError, match=r"history_baseline.safetensors is required in .* found none"):
        make_policy("history", settings(tmp_path / "other"), 1)
    (tmp_path / FILE_NAME).write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="a history baseline of"):
        make_policy("history", settings(tmp_path / "other"), 1)
    assert make_policy("expert", settings(tmp_path), 1) is None


def test_closed_loop(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["drive", str(checkpoint), "--split", "validation", "--first", "3", "--scenes", "2", "--seconds", "0.4"]
    command += ["--size", "64x32", "--device", "cpu", "--flow-steps", "1", "--replan", "2", "--videos", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| | model | history | constant-velocity | expert |" in text
    assert (tmp_path / "closed_loop.md").read_text() in text
    content = json.loads((tmp_path / "closed_loop.json").read_text())
    assert content["conditions"]["samples"] == 1
    for policy in ("model", "history", "constant-velocity", "expert"):
        result = content["policies"][policy]
        assert [scene["index"] for scene in result["scenes"]] == [3, 4]
        assert result["overall"]["scene_score"]["clips"] == 2
    assert content["policies"]["model"]["scenes"][0]["texts"] == 2
    assert content["policies"]["expert"]["overall"]["scene_score"]["mean"] == 1.0
    assert cv2.imread(str(tmp_path / "closed_loop.png")) is not None
    video = cv2.VideoCapture(str(tmp_path / "model" / "000003.mp4"))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == 2
    assert not (tmp_path / "model" / "000004.mp4").exists()


def test_streams_drive(checkpoint: Path) -> None:
    """What keeps features is exact, and so drives like the plain engine."""
    run, rows = RunSettings("validation", 0.2, policy_batch=1), {}
    streaming = StreamingSettings(**vars(settings(checkpoint)))
    for name, model in {
        "plain": settings(checkpoint),
        "features": replace(streaming, stream=StreamSettings("features")),
    }.items():
        driven = ClosedLoopWork(("model",), model, run, (64, 32))([3, 4], "cpu", lambda _: None)
        rows[name] = [row.scores["distance_m"] for _, row in driven]
    assert rows["features"] == pytest.approx(rows["plain"], abs=1e-4)


def test_configurations_drive_the_same_scenes(checkpoint: Path, tmp_path: Path) -> None:
    several = settings(checkpoint, samples=3)
    streams = StreamingSettings(**vars(several), stream=StreamSettings("kv"))
    names = ("plain", "kv")
    drives = ConfiguredDrives(
        dict(zip(names, (several, streams), strict=True)),
        RunSettings("validation", 0.1),
        (64, 32),
        {name: {"scenes": 2} for name in names},
        {name: tmp_path / name for name in names},
    )
    steps: list[int] = []
    driven = drives([3, 4], "cpu", steps.append)
    assert sum(steps) == drives.total([3, 4]) == 2
    assert [(name, row.index, row.texts) for name, row in driven] == [
        ("plain", 3, 1), ("plain", 4, 1), ("kv", 3, 1), ("kv", 4, 1),
    ]  # fmt: skip


def test_the_streaming_engine_by_command(checkpoint: Path, tmp_path: Path) -> None:
    command = ["drive", str(checkpoint), "--policy", "model", "--scenes", "1", "--seconds", "0.1", "--size", "64x32"]
    command += ["--device", "cpu", "--engine", "streaming", "--stream-mode", "kv", "--flow-schedule", "2:0"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    conditions = json.loads((tmp_path / "closed_loop.json").read_text())["conditions"]
    assert (conditions["engine"], conditions["stream_mode"], conditions["flow_schedule"]) == ("streaming", "kv", "2:0")


def test_streams_of_one_run_are_none_of_the_next(checkpoint: Path, observation: Observation) -> None:
    given = StreamingSettings(**vars(settings(checkpoint)), stream=StreamSettings("kv"))
    policy = make_policy("model", given, batch=2)
    assert policy is not None
    observation = observation._replace(stamps_ns=(0, 1, 2, 3))
    first = policy.plan(observation)
    again = policy.plan(observation)
    assert policy.streaming.streams.windows == [2, 2, 2]
    policy.begin()
    other = policy.plan(observation._replace(images=observation.images.flip(0)))
    assert policy.streaming.streams.windows == [1, 1, 1]
    assert first.texts == again.texts
    assert not torch.equal(other.xy, first.xy)
    with pytest.raises(InputError, match="a stamp for each of 4 frames is required"):
        policy.plan(observation._replace(stamps_ns=()))


def test_open_loop(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["drive", str(checkpoint), "--open-loop", "--split", "validation", "--scenes", "2", "--size", "64x32"]
    command += ["--policy", "model", "constant-velocity", "--device", "cpu", "--flow-steps", "1", "--samples", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "ADE@6.4s" in capsys.readouterr().out
    content = json.loads((tmp_path / "open_loop.json").read_text())
    model, straight = (content["policies"][name] for name in ("model", "constant-velocity"))
    places = [[(w["index"], w["step"]) for w in policy["windows"]] for policy in (model, straight)]
    assert places[0] == places[1]
    assert {index for index, _ in places[0]} == {0, 1}
    assert model["natural"]["malformed"]["mean"] == 1.0
    assert "malformed" not in straight["natural"]
    assert model["windows"][0]["errors"]["min_ade@6.4s"] <= model["windows"][0]["errors"]["ade@6.4s"]
    assert cv2.imread(str(tmp_path / "open_loop.png")) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "checkpoint is required for history and model"),
        (["--policy", "model"], "checkpoint is required for model"),
        (["--policy", "expert", "--scenes", "0"], "--scenes must be at least 1, found 0"),
        (["--policy", "expert", "--size", "large"], "--size must be WIDTHxHEIGHT, found 'large'"),
        (["--policy", "expert", "--replan", "11"], "1 to 10 steps between plans"),
        (["--policy", "expert", "--videos", "1"], "--videos needs --out"),
        (["--policy", "expert", "--open-loop"], "policies that plan are required"),
        (["--policy", "expert", "--stream-mode", "kv"], "--stream-mode: --engine streaming is required, found None"),
        (["--policy", "expert", "--engine", "fake"], "--engine fake is for the node"),
        (["nowhere", "--open-loop", "--engine", "streaming"], "--open-loop plans at single moments"),
        (["nowhere", "--policy", "history", "--device", "cpu", "--scenes", "1"], "nowhere"),
    ],
)
def test_what_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drive", *options]) == 2
    assert message in capsys.readouterr().err
