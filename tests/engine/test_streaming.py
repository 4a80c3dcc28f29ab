"""The streaming engine on the bundled checkpoint: against the recording, the plain engine, and its own settings."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flashdrive_node.engine import plain
from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.drafter_config import DrafterConfig
from flashdrive_node.engine.flow_schedule import PUBLISHED_8, FlowSchedule
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.protocol import CameraFrames, EngineError, Observation, Prediction
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.sampling import SamplingSettings

RECORDING = Path(__file__).parents[1] / "data" / "oracle_small"
SETTINGS = StreamingSettings(
    checkpoint=str(RECORDING / "checkpoint"),
    device="cpu",
    precision="float32",
    sampling=SamplingSettings(top_k=1, max_length=19),
    cameras=(1,),
    image_size=(360, 640),
)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return load_file(RECORDING / "inputs.safetensors")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    engine = StreamingEngine(SETTINGS)
    engine.load()
    assert engine.loaded is not None
    return engine.loaded


@pytest.fixture(scope="module")
def windows(inputs) -> list[Observation]:
    """Three windows 0.1 s apart, of which the last is the recorded one."""
    recorded = list(inputs["frames"][0].permute(0, 2, 3, 1).contiguous().numpy())
    pictures = [recorded[0] // 2 + 60, recorded[1][:, ::-1].copy(), *recorded]
    xyz, rot = inputs["ego_history_xyz"][0, 0].numpy(), inputs["ego_history_rot"][0, 0].numpy()

    def window(k: int) -> Observation:
        camera = CameraFrames(1, tuple(100 * (k + i) for i in range(4)), tuple(pictures[k : k + 4]))
        return Observation(k, 100 * (k + 3), (camera,), (xyz * (1 - 0.1 * (2 - k))).astype(np.float32), rot)

    return [window(k) for k in range(3)]


def engine(loaded: LoadedModel, mode: str = "kv", drafter: Drafter | None = None, **changes) -> StreamingEngine:
    stream = StreamSettings(mode, changes.pop("refresh_every", 0), changes.pop("refresh_views", False))
    return StreamingEngine(replace(SETTINGS, stream=stream, **changes), loaded, drafter)


def plain_engine(loaded: LoadedModel, **changes) -> PlainEngine:
    base = {name: getattr(SETTINGS, name) for name in PlainSettings.__dataclass_fields__}
    return PlainEngine(PlainSettings(**(base | changes)), loaded)


def random_drafter(loaded: LoadedModel) -> Drafter:
    text = loaded.model.config.text
    config = replace(text, num_layers=1, mrope_section=(text.head_dim // 2, 0, 0))
    drafter = Drafter(DrafterConfig(config, (1, 3), 6, 2, 9999))
    generator = torch.Generator().manual_seed(0)
    for parameter in (*drafter.parameters(), drafter.mask_embedding):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return drafter.requires_grad_(False).eval()


def assert_same(a: Prediction, b: Prediction) -> None:
    assert [s.reasoning for s in a.samples] == [s.reasoning for s in b.samples]
    assert [s.reasoning_complete for s in a.samples] == [s.reasoning_complete for s in b.samples]
    for x, y in zip(a.samples, b.samples, strict=True):
        np.testing.assert_allclose(x.xyz, y.xyz, atol=1e-4)
        np.testing.assert_allclose(x.yaw, y.yaw, atol=1e-4)
    assert (a.window_id, a.t0_ns, a.chosen) == (b.window_id, b.t0_ns, b.chosen)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "full"},
        {"mode": "features"},
        {"mode": "kv", "refresh_every": 1},
        {"mode": "kv", "refresh_views": True},
        {"mode": "features", "schedule": FlowSchedule.uniform(10)},
        {"mode": "features", "drafted": True},
    ],
    ids=str,
)
def test_sliding_into_the_recorded_window_gives_what_the_reference_recorded(
    loaded, windows, inputs, monkeypatch, options
):
    options = dict(options)
    drafter = random_drafter(loaded) if options.pop("drafted", False) else None
    expected = load_file(RECORDING / "cases" / "onecam.safetensors")
    monkeypatch.setattr(plain.inference, "draw_noise", lambda *_: inputs["noise"])
    one = engine(loaded, drafter=drafter, **options)
    one.step(windows[1])
    prediction = one.step(windows[2])
    np.testing.assert_allclose(prediction.trajectory.xyz, expected["pred_xyz"][0, 0, 0], atol=1e-4)
    assert prediction.trajectory.reasoning == "Keep distance to the lead vehicle since it is slowing."
    assert prediction.trajectory.reasoning_complete
    assert prediction.metrics["new_images"] == (4 if options["mode"] == "full" else 1)


def test_kv_answers_the_first_window_and_goes_on_with_less_work(loaded, windows):
    one, exact = engine(loaded), plain_engine(loaded)
    first = one.step(windows[0])
    assert_same(first, exact.step(windows[0]))
    assert first.metrics["computed_tokens"] == first.metrics["prompt_tokens"]
    second = one.step(windows[1])
    assert second.metrics["new_images"] == 1
    assert second.metrics["computed_tokens"] < 0.5 * second.metrics["prompt_tokens"]
    assert np.isfinite(second.trajectory.xyz).all()
    # The same frames again: no image at all, and still an answer.
    again = one.step(replace(windows[1], t0_ns=450))
    assert again.metrics["new_images"] == 0
    assert not {"images", "encode"} & again.timings_ms.keys()
    # A gap: everything anew, so exactly the plain answer.
    camera = replace(windows[2].cameras[0], stamps_ns=(9000, 9100, 9200, 9300))
    gap = replace(windows[2], cameras=(camera,))
    exact.windows = one.windows
    assert_same(one.step(gap), exact.step(gap))


def test_drafted_text_is_the_plain_text(loaded, windows):
    """Greedy texts are equal whatever the drafter is; sampled ones have its figures and end in time."""
    drafter = random_drafter(loaded)
    drafted, undrafted = engine(loaded, drafter=drafter), engine(loaded)
    for window in windows:
        a, b = drafted.step(window), undrafted.step(window)
        assert_same(a, b)
        assert a.metrics["accept_length"] >= 1
        assert a.metrics["draft_rounds"] <= a.metrics["tokens"]
    sampled = engine(loaded, drafter=drafter, samples=3, sampling=SamplingSettings(temperature=1.5, max_length=9))
    prediction = sampled.step(windows[0])
    assert len(prediction.samples) == 3
    assert len({s.xyz.tobytes() for s in prediction.samples}) == 3
    assert prediction.metrics["tokens"] <= 9


@pytest.mark.parametrize("drafted", [False, True])
def test_nothing_behind_the_prompt_is_left_over_from_the_last_window(loaded, windows, drafted):
    """NaN in every slot behind the prompt before a window: blocks, single tokens and waypoints never see it."""
    drafter = random_drafter(loaded) if drafted else None
    poisoned, clean = (engine(loaded, drafter=drafter, samples=2, schedule=PUBLISHED_8) for _ in range(2))
    for window in windows:
        expected = clean.step(window)
        prediction = poisoned.step(window)
        assert_same(prediction, expected)
        end = int(prediction.metrics["prompt_tokens"])
        assert poisoned.stream is not None
        with torch.inference_mode():
            for tensor in (poisoned.stream.cache.keys, poisoned.stream.cache.values):
                tensor[:, :, end:] = torch.nan


@pytest.mark.parametrize("drafted", [False, True])
def test_shared_text_and_own_noise(loaded, windows, drafted):
    drafter = random_drafter(loaded) if drafted else None
    shared = engine(loaded, drafter=drafter, samples=3, shared_text=True).step(windows[0])
    own = plain_engine(loaded, samples=3).step(windows[0])
    assert len({s.reasoning for s in shared.samples}) == 1
    assert_same(shared, own)  # greedy texts are equal anyway, so sharing one must not change a path


def test_guidance_and_navigation_in_a_stream(loaded, windows):
    turn = [replace(w, nav_text=t) for w, t in zip(windows, ["Turn right in 30m", None, "Turn left"], strict=True)]
    one, exact = (
        e(loaded, guidance_weight=1.5) for e in (lambda *a, **k: engine(*a, mode="features", **k), plain_engine)
    )
    for window in turn:
        a, b = one.step(window), exact.step(window)
        assert ("guidance" in a.timings_ms) == (window.nav_text is not None)
        assert_same(a, b)


def test_schedule_leaves_steps_out_and_reports_an_error(loaded, windows):
    full = engine(loaded).step(windows[0])
    cached = engine(loaded, schedule=PUBLISHED_8).step(windows[0])
    assert "flow_error" not in full.metrics
    assert cached.metrics["flow_error"] > 0
    assert np.abs(cached.trajectory.xyz - full.trajectory.xyz).max() > 1e-4
    assert "flow_error" not in engine(loaded, schedule=FlowSchedule.parse("4:0")).step(windows[0]).metrics
    with pytest.raises(InputError, match="flow_steps and schedule exclude each other"):
        replace(SETTINGS, schedule=PUBLISHED_8, flow_steps=5)


def test_failed_windows_and_resets_start_the_stream_anew(loaded, windows):
    one = engine(loaded)
    first = one.step(windows[0])
    odd = replace(windows[1].cameras[0], images=(*windows[1].cameras[0].images[:3], np.zeros((720, 1280, 3), np.uint8)))
    with pytest.raises(EngineError, match="window 1: camera 1: frames of one camera must have one size"):
        one.step(replace(windows[1], cameras=(odd,)))
    assert one.step(windows[1]).metrics["new_images"] == 4
    stale = replace(windows[1].cameras[0], stamps_ns=(100, 300, 200, 400))
    with pytest.raises(EngineError, match="window 1: camera 0: ascending stamps are required"):
        one.step(replace(windows[1], cameras=(stale,)))
    with pytest.raises(EngineError, match="at least one is required, found none"):
        one.step(replace(windows[1], cameras=()))
    one.reset("new drive")
    assert_same(one.step(windows[0]), first)


def test_life_cycle(loaded, tmp_path):
    one = engine(loaded, drafter=random_drafter(loaded))
    info = one.load()
    assert info.name == "streaming (kv) alpamayo1_5, drafted"
    one.warm_up()
    assert one.windows == one.stream.windows == 0
    cache = one.stream.cache.keys.data_ptr()
    one.reset("again")
    one.warm_up()
    assert one.stream.cache.keys.data_ptr() == cache
    one.close()
    with pytest.raises(EngineError, match="not loaded"):
        one.warm_up()
    with pytest.raises(EngineError, match=r"drafter .*nothing cannot be loaded"):
        StreamingEngine(replace(SETTINGS, drafter=tmp_path / "nothing"), loaded).load()
