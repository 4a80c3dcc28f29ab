"""Clips side by side give what an engine gives clip by clip, gaps, bad windows and breaks included."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.clip import Clip, ClipError, Truth, Window
from flashdrive_node.evaluation.clip_scores import ClipScores
from flashdrive_node.evaluation.evaluation import ResultFolder, run_clip
from flashdrive_node.evaluation.lockstep import HeldClips, Lockstep, TakenClip
from flashdrive_node.model.action_space import yaw_matrix
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.sampling import SamplingSettings
from support.narrow_release import damped_model

CAMERAS, FRAMES, SIZE = (1, 6), 2, (64, 96)
#: Newest frame of each window; between 3 and 30 lies a gap.
DRIVES = {"steady": (1, 2, 3, 4, 5), "gap": (1, 2, 3, 30, 31), "short": (1, 2)}
COMMON = {
    "checkpoint": "none", "device": "cpu", "precision": "float32", "samples": 2, "flow_steps": 2, "seed": 5,
    "cameras": CAMERAS, "sampling": SamplingSettings(temperature=0.0, max_length=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return damped_model()


def window(drive: str, newest: int) -> Window:
    stamps = tuple(100_000_000 * k for k in range(newest - FRAMES + 1, newest + 1))
    cameras = tuple(
        CameraFrames(
            index,
            stamps,
            tuple(
                np.random.default_rng([len(drive), index, s // 100_000_000]).integers(0, 256, (*SIZE, 3), np.uint8)
                for s in stamps
            ),
        )
        for index in CAMERAS
    )
    along = (3.0 + 0.1 * newest) * torch.arange(-15, 1) * 0.1
    xyz = torch.stack((along, 0.01 * along**2, torch.zeros_like(along)), dim=1).numpy()
    # A text that cannot be used: that window has no answer, and the stream begins anew behind it.
    nav = "<|im_end|>" if (drive, newest) == ("steady", 3) else "Turn left in 30m"
    ahead = np.arange(1, 65, dtype=np.float32)[:, None] * np.array([[0.5, 0.0, 0.0]], np.float32)
    truth = Truth(ahead, np.zeros(64, np.float32)) if newest != 2 else None
    return Window(Observation(newest, stamps[-1], cameras, xyz, yaw_matrix(0.02 * along).numpy(), nav), truth)


def clips() -> Iterator[Clip]:
    def windows(name: str, newest: tuple[int, ...]) -> Iterator[Window]:
        for number in newest:
            yield window(name, number)
        if name == "short":
            raise ClipError("the file ends here")

    for name, newest in DRIVES.items():
        yield Clip(name, windows(name, newest), [f"of {name}"])


@pytest.mark.parametrize("mode", [None, "features", "kv"])
def test_results_are_those_of_the_engine(loaded: LoadedModel, mode: str | None, tmp_path: Path) -> None:
    engine = PlainEngine(PlainSettings(**COMMON), loaded)
    if mode is not None:
        engine = StreamingEngine(StreamingSettings(stream=StreamSettings(mode), **COMMON), loaded)
    folders = [ResultFolder(tmp_path / name) for name in ("engine", "lockstep")]
    for folder in folders:
        folder.prepare({})
    wanted = [run_clip(engine, clip, folders[0]) for clip in clips()]
    found = Lockstep(loaded, engine.settings).answer([TakenClip.of(clip) for clip in clips()], folders[1])
    for ours, theirs in zip(found, wanted, strict=True):
        compare(ours, theirs)
    assert [len(clip.windows) for clip in found] == [5, 5, 2]
    assert "special tokens" in found[0].windows[2].problem
    assert found[2].problem == "after 2 window(s): the file ends here"
    pictures = [sorted(path.name for path in folder.clips.iterdir()) for folder in folders]
    assert pictures[0] == pictures[1] == ["gap.jpg", "short.jpg", "steady.jpg"]


def compare(ours: ClipScores, theirs: ClipScores) -> None:
    assert (ours.name, ours.notes, ours.problem) == (theirs.name, theirs.notes, theirs.problem)
    for a, b in zip(ours.windows, theirs.windows, strict=True):
        assert (a.index, a.t0_ns, a.texts, a.complete, a.agree) == (b.index, b.t0_ns, b.texts, b.complete, b.agree)
        assert (a.problem == "") == (b.problem == "")
        assert a.errors == pytest.approx(b.errors, abs=2e-4)
    assert ours.worst is not None
    assert theirs.worst is not None
    assert ours.worst.index == theirs.worst.index


def test_clips_that_are_held_are_given_again(loaded: LoadedModel) -> None:
    class Source:
        name, camera_indices = "drives", CAMERAS

        def clips(self) -> Iterator[Clip]:
            yield Clip("empty", iter(()))
            yield from clips()

    held = HeldClips(Source(), 2)
    for _ in range(2):
        assert [(clip.name, len(list(clip.windows))) for clip in held.clips()] == [("steady", 5), ("gap", 5)]
    assert (len(held), held.name) == (2, "drives")
