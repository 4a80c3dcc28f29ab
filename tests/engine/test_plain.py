"""The plain engine on the bundled small checkpoint: same answers as the reference recording, and well-behaved."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flashdrive_node.engine import plain
from flashdrive_node.engine.plain import PlainEngine, PlainSettings
from flashdrive_node.engine.protocol import CameraFrames, EngineError, Observation
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.presets import alpamayo_1_5_10b, alpamayo_r1_10b
from flashdrive_node.model.sampling import SamplingSettings
from support.narrow_release import write_random_checkpoint

RECORDING = Path(__file__).parents[1] / "data" / "oracle_small"
GREEDY = SamplingSettings(top_k=1, max_length=19)
SETTINGS = PlainSettings(
    checkpoint=str(RECORDING / "checkpoint"),
    device="cpu",
    precision="float32",
    sampling=GREEDY,
    cameras=(1,),
    image_size=(360, 640),
)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return load_file(RECORDING / "inputs.safetensors")


@pytest.fixture(scope="module")
def observation(inputs) -> Observation:
    frames = inputs["frames"][0].permute(0, 2, 3, 1).contiguous().numpy()
    camera = CameraFrames(1, (0, 100, 200, 300), tuple(frames))
    return Observation(
        7, 300, (camera,), inputs["ego_history_xyz"][0, 0].numpy(), inputs["ego_history_rot"][0, 0].numpy()
    )


@pytest.fixture(scope="module")
def engine() -> PlainEngine:
    engine = PlainEngine(SETTINGS)
    engine.load()
    return engine


def engine_with(engine: PlainEngine, **changes) -> PlainEngine:
    return PlainEngine(replace(SETTINGS, **changes), engine.loaded)


def test_step_gives_what_the_reference_recorded(engine, observation, inputs, monkeypatch):
    expected = load_file(RECORDING / "cases" / "onecam.safetensors")
    monkeypatch.setattr(plain.inference, "draw_noise", lambda *_: inputs["noise"])
    prediction = engine.step(observation)
    assert (prediction.window_id, prediction.t0_ns, prediction.chosen) == (7, 300, 0)
    sample = prediction.trajectory
    np.testing.assert_allclose(sample.xyz, expected["pred_xyz"][0, 0, 0], atol=1e-4)
    yaw = torch.atan2(expected["pred_rot"][0, 0, 0, :, 1, 0], expected["pred_rot"][0, 0, 0, :, 0, 0])
    np.testing.assert_allclose(sample.yaw, yaw, atol=1e-4)
    assert sample.reasoning == "Keep distance to the lead vehicle since it is slowing."
    assert sample.reasoning_complete
    assert prediction.initial_speed == pytest.approx(float(expected["v0"]), abs=1e-5)
    # Speed and acceleration tell the same story as the points.
    steps = np.linalg.norm(np.diff(sample.xyz[:, :2], axis=0), axis=1) / 0.1
    np.testing.assert_allclose(steps, np.abs(sample.speed[1:] + sample.speed[:-1]) / 2, atol=0.05)
    np.testing.assert_allclose(np.diff(sample.speed), 0.1 * sample.acceleration[1:], atol=1e-4)
    assert {"images", "encode", "prefill", "decode", "action", "total"} == prediction.timings_ms.keys()
    stages = sum(ms for stage, ms in prediction.timings_ms.items() if stage != "total")
    assert stages <= prediction.timings_ms["total"]


def test_load_says_what_it_loaded(engine):
    info = engine.load()
    assert info.name == "plain alpamayo1_5"
    assert info.checkpoint == str(RECORDING / "checkpoint")
    assert len(info.sha256) == 64
    assert (info.device, info.precision, info.history_poses) == ("cpu", "float32", 16)
    assert (info.waypoints, info.waypoint_dt_s) == (64, 0.1)


def test_streams_repeat_themselves(engine, observation):
    """Seeds count windows from the last reset: two streams of the same windows are equal, two windows are not."""
    sampled = SamplingSettings(temperature=1.5, max_length=12)
    one = engine_with(engine, sampling=sampled, samples=2)
    first, second = one.step(observation), one.step(observation)
    assert not np.array_equal(first.trajectory.xyz, second.trajectory.xyz)
    one.reset("again")
    again = one.step(observation)
    assert [s.reasoning for s in again.samples] == [s.reasoning for s in first.samples]
    for a, b in zip(first.samples, again.samples, strict=True):
        np.testing.assert_array_equal(a.xyz, b.xyz)


def test_samples_have_their_own_noise_and_the_medoid_is_chosen(engine, observation):
    prediction = engine_with(engine, samples=5).step(observation)
    points = np.stack([s.xyz[:, :2] for s in prediction.samples])
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1).mean(-1)
    assert (distance + np.eye(5) > 1e-3).all()
    assert prediction.chosen == distance.mean(1).argmin()


def test_medoid_is_never_a_sample_that_is_not_finite():
    points = torch.zeros(3, 4, 2)
    points[1], points[0, 2, 1] = 1.0, torch.nan
    points[2] = 1.5
    assert plain.medoid(points) in (1, 2)
    assert plain.medoid(torch.full((2, 4, 2), torch.nan)) == 0


def test_navigation_text_and_guidance_change_the_path(engine, observation):
    turn = replace(observation, nav_text="Turn right in 30m")
    bare, told = (engine_with(engine).step(o).trajectory.xyz for o in (observation, turn))
    guided = engine_with(engine, guidance_weight=1.5).step(turn)
    assert "guidance" in guided.timings_ms
    assert np.abs(bare - told).max() > 1e-3
    assert np.abs(guided.trajectory.xyz - told).max() > 1e-3
    # Guidance has nothing to guide without navigation text.
    unguided = engine_with(engine, guidance_weight=1.5).step(observation)
    assert "guidance" not in unguided.timings_ms
    np.testing.assert_array_equal(unguided.trajectory.xyz, bare)


def test_question_gets_the_recorded_answer(engine, observation):
    recorded = json.loads((RECORDING / "cases" / "vqa.json").read_text())
    answer = engine.answer(observation, "Describe the scene.", SamplingSettings(top_k=1, max_length=12))
    assert answer == recorded["generated_text"][0].strip()


@pytest.mark.parametrize("question", ["", "what <|answer_end|>", "why? " * 400])
def test_bad_questions_are_refused(engine, observation, question):
    with pytest.raises(EngineError, match="window 7: question may"):
        engine.answer(observation, question)


def test_cut_reasoning_is_not_complete(engine, observation):
    short = engine_with(engine, sampling=SamplingSettings(top_k=1, max_length=5))
    sample = short.step(observation).trajectory
    assert not sample.reasoning_complete
    assert sample.reasoning == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ego_history_xyz": np.zeros((15, 3), np.float32)}, r"positions \[..., 16, 3\].* are required, found"),
        ({"ego_history_xyz": np.full((16, 3), np.nan, np.float32)}, "finite poses are required"),
        ({"nav_text": "go <|im_end|>"}, "may not contain special tokens"),
        ({"nav_text": "x " * 500}, "navigation text may have"),
        ({"cameras": ()}, "at least one camera is required, found none"),
    ],
)
def test_bad_windows_are_refused_and_the_engine_goes_on(engine, observation, change, message):
    with pytest.raises(EngineError, match=message) as refused:
        engine.step(replace(observation, **change))
    assert str(refused.value).startswith("window 7: ")
    assert np.isfinite(engine.step(observation).trajectory.xyz).all()


def test_frames_of_unequal_size_are_refused(engine, observation):
    images = (*observation.cameras[0].images[:3], np.zeros((720, 1280, 3), np.uint8))
    odd = replace(observation, cameras=(replace(observation.cameras[0], images=images),))
    with pytest.raises(EngineError, match="frames of one camera must have one size"):
        engine.step(odd)


def test_life_cycle(tmp_path):
    missing = PlainEngine(replace(SETTINGS, checkpoint=str(tmp_path / "none")))
    with pytest.raises(EngineError, match="cannot be loaded"):
        missing.load()
    engine = PlainEngine(SETTINGS)
    with pytest.raises(EngineError, match="not loaded"):
        engine.warm_up()
    seen = []
    engine.load(lambda fraction, what: seen.append(fraction))
    assert seen[-1] == 1.0
    engine.warm_up()
    assert engine.windows == 0
    engine.close()
    with pytest.raises(EngineError, match="not loaded"):
        engine.warm_up()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"samples": 0}, "samples must be at least 1"), ({"precision": "int3"}, "precision must be one of")],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        replace(SETTINGS, **arguments)


@pytest.mark.parametrize(("release", "prompt_tokens"), [(alpamayo_1_5_10b, 3086), (alpamayo_r1_10b, 3006)])
def test_both_releases_run_on_four_cameras(tmp_path, release, prompt_tokens):
    """Published vocabulary, prompt and file format, small layers: from files on disk to two samples."""
    directory = write_random_checkpoint(tmp_path / "checkpoint", base=release())
    settings = replace(
        SETTINGS,
        checkpoint=str(directory),
        samples=2,
        sampling=SamplingSettings(max_length=6),
        cameras=(0, 1, 2, 6),
    )
    engine = PlainEngine(settings)
    info = engine.load()
    assert info.name == f"plain {release().model_type}"
    model = engine.loaded.model
    # Rounded by the code for 1.5, stored rounded in the file for R1: the same numbers either way.
    rounded = torch.tensor([0.029052734375, 0.6796875, 0.0002689361572265625, 0.026123046875])
    torch.testing.assert_close(model.action_space.constants, rounded, rtol=0, atol=0)
    frequencies = [1, 1.671875, 2.78125, 4.65625, 7.75, 12.9375, 21.5, 36, 60, 100]
    assert model.expert.action_in_proj.frequencies.tolist() == [frequencies] * 3
    rng = np.random.default_rng(0)
    cameras = tuple(
        CameraFrames(c, (0, 1, 2, 3), tuple(rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8) for _ in range(4)))
        for c in settings.cameras
    )
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = np.arange(-15, 1)
    observation = Observation(0, 0, cameras, xyz, np.tile(np.eye(3, dtype=np.float32), (16, 1, 1)))
    prediction = engine.step(observation)
    assert prediction.metrics["prompt_tokens"] == prompt_tokens
    assert len(prediction.samples) == 2
    assert all(np.isfinite(s.xyz).all() for s in prediction.samples)
    assert prediction.initial_speed == pytest.approx(10.0, abs=0.05)
    if not model.config.supports_navigation:
        with pytest.raises(EngineError, match=r"navigation text needs Alpamayo 1\.5"):
            engine.step(replace(observation, nav_text="Turn left"))


@pytest.mark.parametrize("device", ["gpu", "cuda:0,cuda:1", "cpu:x"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(InputError, match=f"cuda:NUMBER is required, found '{device}'"):
        _ = replace(SETTINGS, device=device).torch_device
