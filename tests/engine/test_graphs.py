"""Graphs of stages: on a CPU plain calls; on a GPU the same numbers, nothing left over, and nothing waited for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashdrive_node.engine import streaming
from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.drafter_config import PARTS, DrafterConfig, Rotary, rotary_sections
from flashdrive_node.engine.flow_schedule import PUBLISHED_8
from flashdrive_node.engine.frame_copies import FrameCopies
from flashdrive_node.engine.graphs import Cuts, Graphs
from flashdrive_node.engine.protocol import CameraFrames, Observation, Prediction
from flashdrive_node.engine.read_back import ReadBack
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.sampling import SamplingSettings

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a CUDA device")

CAMERAS = (0, 6)
SETTINGS = StreamingSettings(
    checkpoint=str(Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"),
    sampling=SamplingSettings(temperature=1.2, max_length=14),
    cameras=CAMERAS,
    image_size=(360, 640),
    schedule=PUBLISHED_8,
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    engine = StreamingEngine(SETTINGS)
    engine.load()
    assert engine.loaded is not None
    return engine.loaded


@pytest.fixture(scope="module")
def exact() -> LoadedModel:
    """The same in float32."""
    engine = StreamingEngine(replace(SETTINGS, precision="float32"))
    engine.load()
    assert engine.loaded is not None
    return engine.loaded


def drafter(loaded: LoadedModel, rotary: Rotary | None) -> Drafter:
    """A random one: routine with these positions, or DFlash."""
    text = loaded.model.config.text
    decoder = replace(text, num_layers=1, mrope_section=rotary_sections(rotary or "local", text))
    config = DrafterConfig(decoder, (1, 3), 6, 2, 9999)
    drafter = Drafter(config if rotary is None else replace(config, rotary=rotary, parts=PARTS))
    generator = torch.Generator().manual_seed(0)
    for parameter in (*drafter.parameters(), drafter.mask_embedding):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return drafter.requires_grad_(False).eval().to(loaded.model.device, loaded.model.dtype)


def engine(
    loaded: LoadedModel, drafted: bool = True, mode: str = "kv", rotary: Rotary | None = None, **changes
) -> StreamingEngine:
    settings = replace(SETTINGS, stream=StreamSettings(mode), **changes)  # type: ignore[arg-type]
    return StreamingEngine(settings, loaded, drafter(loaded, rotary) if drafted else None)


def window(index: int, nav_text: str | None = None) -> Observation:
    numbers = range(index, index + 4)
    cameras = tuple(
        CameraFrames(
            camera,
            tuple(100 * n for n in numbers),
            tuple(np.random.default_rng((camera, n)).integers(0, 256, (360, 640, 3), dtype=np.uint8) for n in numbers),
        )
        for camera in CAMERAS
    )
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = np.arange(-15, 1) * (0.5 + 0.01 * index)
    return Observation(index, index, cameras, xyz, np.tile(np.eye(3, dtype=np.float32), (16, 1, 1)), nav_text)


#: Settings that take different stages.
OPTIONS: list[dict[str, Any]] = [
    {"samples": 2},
    {"samples": 2, "shared_text": True, "guidance_weight": 1.5},
    {"mode": "features", "drafted": False},
    {"mode": "kv", "drafted": False},
    {"mode": "features", "guidance_weight": 1.5},
    {"mode": "full", "samples": 3},
    {"rotary": "flat"},
    {"rotary": "mrope", "samples": 2, "draft_confidence": 1e-6},
    {"rotary": "local", "mode": "features", "draft_confidence": 0.9},
]

#: Steady driving, with what comes in between: navigation text of two lengths, a missed tick, a repetition, and a gap.
DRIVE = [
    *(window(k) for k in range(3)),
    *(window(k, "Turn left in 30m") for k in (3, 4)),
    window(5, "Turn right onto a long street in 120m"),
    *(window(k) for k in (7, 7, 60, 61, 62)),
]


def assert_equal(found: list[Prediction], expected: list[Prediction]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert [s.reasoning for s in a.samples] == [s.reasoning for s in b.samples]
        assert {**a.metrics, "graph_captures": 0} == {**b.metrics, "graph_captures": 0}
        for x, y in zip(a.samples, b.samples, strict=True):
            np.testing.assert_array_equal(x.xyz, y.xyz)


def test_functions_are_called_where_there_are_no_graphs():
    graphs, calls = Graphs(torch.device("cpu")), []
    for _ in range(3):
        graphs.run("key", lambda: calls.append(1))
    assert (len(calls), graphs.captures, graphs.refused, graphs.enabled) == (3, 0, {}, False)
    graphs.clear()


class Recorded(Graphs):
    """Stands in for graphs on a CPU: like a graph, a key's later runs do what its first function did, with its tensors.

    What a stage should have read from a buffer that stays in place, but read from what it was given, is then stale.
    """

    def __init__(self, device: torch.device, enabled: bool = True, limit: int = 64):
        super().__init__(device, enabled, limit)
        self.enabled = enabled
        self.functions: dict[Hashable, Callable[[], None]] = {}
        self.runs = 0

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        self.runs += 1
        self.functions.setdefault(key, function)()

    def clear(self) -> None:
        self.functions.clear()


class FakeEvent:
    """An event or a stream of a device that does everything at once."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def wait_event(self, event: FakeEvent) -> None: ...

    def wait_stream(self, stream: FakeEvent) -> None: ...


@pytest.mark.skipif(torch.cuda.is_available(), reason="imitates on a CPU what a GPU does")
@pytest.mark.parametrize("options", [*OPTIONS[:3], OPTIONS[-2]], ids=str)
def test_stages_read_from_buffers_that_stay_in_place(loaded, options, monkeypatch):
    plain = engine(loaded, graphs=False, **options)
    expected = [plain.step(w) for w in DRIVE]
    monkeypatch.setattr(streaming, "Graphs", Recorded)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeEvent())
    recorded = engine(loaded, **options)
    encoder = recorded._streaming()[1].encoder
    encoder._copies = FrameCopies()
    encoder._uploads = encoder._sent = encoder._read = FakeEvent()  # type: ignore[assignment]
    assert_equal([recorded.step(w) for w in DRIVE], expected)
    assert isinstance(recorded.graphs, Recorded)
    assert recorded.graphs.runs > 1.5 * len(recorded.graphs.functions)
    recorded.reset("again")
    plain.reset("again")
    assert_equal([recorded.step(DRIVE[0])], [plain.step(DRIVE[0])])
    # Frames that come ahead go through the same buffers one by one.
    for w in DRIVE[1:3]:
        for camera in w.cameras:
            recorded.ingest(camera.camera_index, camera.stamps_ns[-1], camera.images[-1])
        found, wanted = recorded.step(w).trajectory.xyz, plain.step(w).trajectory.xyz
        np.testing.assert_allclose(found, wanted, atol=0.05 * float(np.abs(wanted).max()))


def test_read_back():
    values = torch.arange(6.0).view(2, 3)
    back = ReadBack(values)
    back.start(values)
    values += 1
    assert back.wait().tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


@on_gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graphs_change_nothing(loaded, options):
    graphed, plain = engine(loaded, **options), engine(loaded, graphs=False, **options)
    found = [graphed.step(w) for w in DRIVE]
    assert_equal(found, [plain.step(w) for w in DRIVE])
    assert graphed.graphs is not None
    assert sum(p.metrics.get("graph_captures", 0) for p in found) == graphed.graphs.captures >= 4
    assert not graphed.graphs.refused
    graphed.reset("again")
    plain.reset("again")
    assert_equal([graphed.step(w) for w in DRIVE[:4]], [plain.step(w) for w in DRIVE[:4]])


@on_gpu
@pytest.mark.parametrize("options", [{}, {"drafted": False, "samples": 3, "guidance_weight": 1.5}], ids=str)
def test_unused_slots_are_never_seen(loaded, options):
    """NaN in every slot behind the prompt, before every window."""
    clean, poisoned = engine(loaded, **options), engine(loaded, **options)
    found = []
    for w in DRIVE:
        found.append(poisoned.step(w))
        assert poisoned.stream is not None
        assert poisoned.stream.cache is not None
        with torch.inference_mode():
            for tensor in (poisoned.stream.cache.keys, poisoned.stream.cache.values):
                tensor[:, :, poisoned.stream.cache.used :] = torch.nan
    assert_equal(found, [clean.step(w) for w in DRIVE])


@on_gpu
def test_nothing_is_waited_for_but_read_backs(loaded):
    one = engine(loaded)
    one.warm_up()
    for k in range(5):
        one.step(window(k))
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.step(window(5))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_memory_is_constant_behind_the_warm_up(loaded):
    gc.collect()  # engines of other tests, whose memory would be given back in between
    one, allocated, captures = engine(loaded), [], []
    one.warm_up()
    for _ in range(4):
        one.reset("again")
        for w in DRIVE:
            one.step(w)
        assert one.graphs is not None
        allocated.append(torch.cuda.memory_allocated())
        captures.append(one.graphs.captures)
    # What comes in every drive once has come twice by the second.
    assert allocated[1:] == allocated[1:2] * 3
    assert captures[1:] == captures[1:2] * 3


@on_gpu
def test_frames_that_come_ahead_leave_the_same_cache(exact):
    """Batches of another size round otherwise, which a random network's texts may turn on; its keys do not."""
    ahead, at_once = engine(exact), engine(exact)
    for w in DRIVE:
        for camera in w.cameras:
            ahead.ingest(camera.camera_index, camera.stamps_ns[-1], camera.images[-1])
        caches = []
        for one in (ahead, at_once):
            one.step(w)
            assert one.stream is not None
            assert one.stream.cache is not None
            prompt = one.stream._prompt
            assert prompt is not None
            caches.append(torch.stack((one.stream.cache.keys, one.stream.cache.values))[:, :, :, : len(prompt.ids)])
        found, expected = caches
        assert (found - expected).norm() < 2e-3 * expected.norm()


@on_gpu
def test_streams_over_one_set_of_weights_do_not_affect_each_other(loaded):
    one, other, alone = (engine(loaded) for _ in range(3))
    found = []
    for w, v in zip(DRIVE, DRIVE[3:] + DRIVE[:3], strict=True):
        found.append(one.step(w))
        other.step(v)
    assert_equal(found, [alone.step(w) for w in DRIVE])


def adding_to(x: torch.Tensor) -> Callable[[], None]:
    """A function that adds 1, by way of memory of its own."""

    def add() -> None:
        x.add_(torch.ones_like(x))

    return add


@on_gpu
def test_a_function_that_cannot_be_captured_runs_step_by_step():
    graphs, x = Graphs(torch.device("cuda")), torch.zeros(2, device="cuda")

    def peeks() -> None:
        x.add_(1 + int(x[0].item() < -1))  # a capture may not wait for the device

    for _ in range(4):
        graphs.run("peeks", peeks)
    assert x.tolist() == [4.0, 4.0]
    assert list(graphs.refused) == ["peeks"]
    for _ in range(3):
        graphs.run("adds", adding_to(x))
    assert x.tolist() == [7.0, 7.0]
    assert graphs.captures == 1


@on_gpu
def test_what_is_made_in_front_of_a_cut_is_there_behind_it():
    graphs, x = Graphs(torch.device("cuda")), torch.zeros(1 << 16, device="cuda")

    def doubles() -> None:
        more = x + 1
        graphs.cut()
        others = [torch.full_like(x, 7.0) for _ in range(3)]  # would take the place of what was freed
        graphs.cut()
        x.copy_(more + x + 0 * sum(others))

    for _ in range(5):
        graphs.run("doubles", doubles)
        graphs.run("adds", adding_to(x))
    assert x.unique().tolist() == [62.0]  # 2 x + 1 + 1, five times
    assert (graphs.captures, graphs.refused) == (2, {})


class Counted(Graphs):
    """Knows how many passes were through when it was cut."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.through = 0
        self.cut_at: list[int] = []

    def cut(self) -> None:
        self.cut_at.append(self.through)


@pytest.mark.parametrize(
    ("layers", "passes", "expected"),
    [(36, 4, [3, 11, 36, 72, 108]), (36, 1, [3, 11]), (11, 1, [3]), (2, 3, [2, 3, 4])],
)
def test_where_passes_are_cut(layers, passes, expected):
    """Behind few layers, behind more, and between passes: never behind the last layer."""
    graphs = Counted()
    cuts = Cuts(graphs, layers, passes)
    for graphs.through in range(1, layers * passes + 1):
        cuts.behind((graphs.through - 1) % layers, torch.zeros(0))
    assert graphs.cut_at == expected


@on_gpu
def test_graphs_are_captured_again_when_all_were_forgotten():
    graphs, x = Graphs(torch.device("cuda"), limit=1), torch.zeros(1 << 20, device="cuda")
    for key in ("a", "a", "a", "b", "b", "b"):  # the only graph makes room
        graphs.run(key, adding_to(x))
    graphs.clear()
    for _ in range(3):
        graphs.run("a", adding_to(x))
    assert x.unique().tolist() == [9.0]
    assert (graphs.captures, graphs.refused) == (3, {})


@on_gpu
def test_the_graph_unused_for_longest_goes_first():
    graphs, x = Graphs(torch.device("cuda"), limit=2), torch.zeros(1, device="cuda")
    for key in ("a", "a", "b", "b", "a", "c", "c", "a", "b", "b"):
        graphs.run(key, adding_to(x))
    assert x.item() == 10
    assert graphs.captures == 4  # a, b, c, and b again
