"""Recorded values of the reference come out of our networks, and a fault planted in them does not go unseen."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

from flashdrive_node.cli import main as cli
from flashdrive_node.evaluation import parity
from flashdrive_node.evaluation.recording import load_recording
from flashdrive_node.model import images, inference, rope, vision
from flashdrive_node.model.action_space import ActionSpace, yaw_matrix
from flashdrive_node.model.action_space import Path as DrivenPath
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.model.vision import VisionFeatures, VisionTower

RECORDING = Path(__file__).parents[1] / "data" / "oracle_small"


@pytest.fixture(scope="module")
def recording():
    return load_recording(RECORDING)


@pytest.fixture
def loaded(recording):
    return load_alpamayo(recording.checkpoint, dtype=torch.float32)


def run(loaded, recording, name: str) -> parity.CaseResult:
    return parity.run_case(loaded, next(c for c in recording.cases if c.name == name))


@pytest.mark.parametrize("name", ["onecam", "vqa"])
def test_every_recorded_value(loaded, recording, name):
    result = run(loaded, recording, name)
    assert result.passed(), [s for s in result.stages if not s.passed]
    assert sum(s.tensors for s in result.stages) == len(result.case.expected)


def test_command_passes_and_dumps(tmp_path, capsys):
    assert cli.main(["parity", str(RECORDING), "--dump", str(tmp_path)]) == 0
    assert "2 of 2 cases within bounds" in capsys.readouterr().out
    for name in ("onecam", "vqa"):
        dumped, expected = (
            load_file(tmp_path / f"{name}.safetensors"),
            load_file(RECORDING / f"cases/{name}.safetensors"),
        )
        assert dumped.keys() == expected.keys()
        assert all(dumped[k].shape == expected[k].shape and dumped[k].dtype == expected[k].dtype for k in expected)


def test_bfloat16_is_close(recording):
    """Not judged by the command; here held to a loose bound, so that a wrong dtype somewhere is seen."""
    result = run(load_alpamayo(recording.checkpoint, dtype=torch.bfloat16), recording, "onecam")
    assert result.passed(exact_only=True)
    errors = {s.stage: s.error for s in result.stages}
    # bfloat16 keeps 8 bits: 0.4 % per rounding, over a handful of layers.
    assert all(errors[stage] < 0.05 for stage in ("vision", "language", "cache", "logits"))


def exact_resize(images_u8: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    floats = interpolate(images_u8.float(), size=size, mode="bicubic", antialias=True)
    return floats.round().clamp(0, 255).to(torch.uint8)


def euler_path(self: ActionSpace, action: torch.Tensor, initial_speed: torch.Tensor, z: float = 0.0) -> DrivenPath:
    dt, (a_mean, a_std, k_mean, k_std) = self.config.dt, self.constants.unbind()
    accel, curvature = action[..., 0] * a_std + a_mean, action[..., 1] * k_std + k_mean
    speed = initial_speed[..., None] + torch.cumsum(accel * dt, -1)
    yaw = torch.cumsum(curvature * speed * dt, -1)
    x, y = torch.cumsum(speed * yaw.cos() * dt, -1), torch.cumsum(speed * yaw.sin() * dt, -1)
    xyz = torch.stack((x, y, torch.full_like(x, z)), -1)
    return DrivenPath(xyz, yaw_matrix(yaw), yaw, speed, accel, curvature)


def finite_difference_speed(self: ActionSpace, xyz: torch.Tensor, rot: torch.Tensor) -> torch.Tensor:
    return (xyz[..., -1, :2] - xyz[..., -2, :2]).norm(dim=-1) / self.config.dt


def plant(fault: str, monkeypatch, loaded):
    """Break one thing; gives the model to run."""
    model = loaded.model
    if fault == "position + 1":
        original = inference.mrope_cos_sin
        monkeypatch.setattr(inference, "mrope_cos_sin", lambda p, *rest: original(p + 1, *rest))
    elif fault == "no DeepStack":
        forward = VisionTower.forward
        monkeypatch.setattr(
            VisionTower, "forward", lambda self, *a, **k: VisionFeatures(forward(self, *a, **k).embeds, [])
        )
    elif fault == "DeepStack one layer late":
        forward = VisionTower.forward

        def late(self, *a, **k):
            found = forward(self, *a, **k)
            return VisionFeatures(found.embeds, [torch.zeros_like(found.embeds), *found.deepstack])

        monkeypatch.setattr(VisionTower, "forward", late)
    elif fault == "height and width swapped":
        axes = rope.mrope_axes
        monkeypatch.setattr(rope, "mrope_axes", lambda *a: torch.tensor([0, 2, 1])[axes(*a)])
    elif fault == "plain RoPE":
        axes = rope.mrope_axes
        monkeypatch.setattr(rope, "mrope_axes", lambda *a: torch.zeros_like(axes(*a)))
    elif fault == "causal expert":
        model.config = dataclasses.replace(model.config, expert_non_causal=False)
    elif fault == "history offset by one":
        encode = parity.encode_history
        monkeypatch.setattr(parity, "encode_history", lambda *a: encode(*a) + 1)
    elif fault == "float resize":
        monkeypatch.setattr(images, "resize_uint8", exact_resize)
    elif fault == "Euler unicycle":
        monkeypatch.setattr(ActionSpace, "to_path", euler_path)
    elif fault == "finite-difference speed":
        monkeypatch.setattr(ActionSpace, "initial_speed", finite_difference_speed)
    elif fault == "unrounded constants":
        model.set_constants("exact", "cpu")
    elif fault == "exact GELU in the vision blocks":
        gelu = vision.gelu
        monkeypatch.setattr(vision, "gelu", lambda x, approximate="none": gelu(x))
    elif fault == "trajectory tokens not masked":
        first = model.config.tokens.traj_token_start
        model.language.lm_head.weight[first + 7] = 10 * model.language.lm_head.weight[first - 60]
        rule = inference.StopRule
        monkeypatch.setattr(inference, "StopRule", lambda **k: rule(**(k | {"forbidden": None})))
    elif fault == "nine flow steps":
        flow = dataclasses.replace(model.config.flow, num_inference_steps=9)
        model.config = dataclasses.replace(model.config, flow=flow)
    return loaded


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ("position + 1", "flow"),
        ("no DeepStack", "language"),
        ("DeepStack one layer late", "language"),
        ("height and width swapped", "cache"),
        ("plain RoPE", "cache"),
        ("causal expert", "flow"),
        ("history offset by one", "history"),
        ("float resize", "vision"),
        ("Euler unicycle", "path"),
        ("finite-difference speed", "speed"),
        ("unrounded constants", "flow"),
        ("exact GELU in the vision blocks", "vision"),
        ("trajectory tokens not masked", "logits"),
        ("nine flow steps", "action"),
    ],
)
def test_planted_fault_turns_red(monkeypatch, loaded, recording, fault, stage):
    result = run(plant(fault, monkeypatch, loaded), recording, "onecam")
    assert not result.passed()
    assert stage in [s.stage for s in result.stages if not s.passed]


def test_command_fails_and_names_the_tensor(monkeypatch, tmp_path, capsys):
    copy = tmp_path / "recording"
    shutil.copytree(RECORDING, copy)
    case = copy / "cases" / "vqa.safetensors"
    tensors = load_file(case)
    tensors["cache.v.3"][0, 0, 5, 2] += 1.0
    save_file(tensors, case)
    assert cli.main(["parity", str(copy), "--case", "vqa"]) == 1
    out = capsys.readouterr().out
    assert "vqa: cache error" in out
    assert "cache.v.3" in out


def test_recording_without_values_is_run_and_dumped(tmp_path):
    copy = tmp_path / "recording"
    shutil.copytree(RECORDING, copy)
    (copy / "cases" / "onecam.safetensors").unlink()
    assert cli.main(["parity", str(copy), "--case", "onecam", "--dump", str(tmp_path / "out")]) == 0
    dumped, expected = (
        load_file(tmp_path / "out" / "onecam.safetensors"),
        load_file(RECORDING / "cases/onecam.safetensors"),
    )
    assert expected.keys() <= dumped.keys()


def test_bad_recordings_are_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"not a recording: manifest\.json is required"):
        load_recording(tmp_path)
    assert cli.main(["parity", str(RECORDING), "--case", "nothing"]) == 2
    assert "no such case: ['nothing']; the recording has ['onecam', 'vqa']" in capsys.readouterr().err
    copy = tmp_path / "recording"
    shutil.copytree(RECORDING, copy)
    case = json.loads((copy / "cases/onecam.json").read_text())
    case["call"]["num_traj_samples"] = 5
    (copy / "cases/onecam.json").write_text(json.dumps(case))
    with pytest.raises(InputError, match="5 samples need as many rows of noise, inputs hold 1"):
        load_recording(copy)
