"""Frames arrive whole, whatever their layout, and nobody writes to a target behind the end."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashdrive_node.engine import frame_copies
from flashdrive_node.engine.frame_copies import FrameCopies


def _frames(count: int, height: int, width: int, layout: str, seed: int) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        frame = rng.integers(0, 256, (height, 2 * width, 3), dtype=np.uint8)
        frame = {"rows": frame[:, :width], "columns": frame[:, ::2], "bgr": frame[:, :width, ::-1]}[layout]
        frame.setflags(write=False)
        frames.append(frame)
    return frames


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 8),
    layout=st.sampled_from(("rows", "columns", "bgr")),
    threads=st.integers(1, 6),
    pieces=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_piece_is_there_when_it_is_named(
    count: int, height: int, width: int, layout: str, threads: int, pieces: int, seed: int
) -> None:
    frames = _frames(count, height, width, layout, seed)
    targets = [np.zeros((height, width, 3), np.uint8) for _ in frames]
    covered: list[tuple[int, int]] = []
    for frame, rows in FrameCopies(threads, pieces).start(targets, frames):
        np.testing.assert_array_equal(targets[frame][rows], frames[frame][rows])
        covered += [(frame, row) for row in range(height)[rows]]
    assert sorted(covered) == [(frame, row) for frame in range(count) for row in range(height)]


class _Slow:
    """NumPy whose copies take their time, and which counts those that are under way."""

    def __init__(self) -> None:
        self.writing = 0
        self.begun = threading.Event()

    def copyto(self, target: NDArray[np.uint8], frame: NDArray[np.uint8]) -> None:
        if target.shape != frame.shape:
            self.begun.wait(5)
            raise ValueError("shapes differ")
        self.writing += 1
        self.begun.set()
        time.sleep(0.05)
        np.copyto(target, frame)
        self.writing -= 1


def test_an_error_comes_behind_the_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = _Slow()
    monkeypatch.setattr(frame_copies, "np", slow)
    frames = [np.ones((4, 3, 3), np.uint8), np.ones((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)]
    targets = [np.zeros((4, 4, 3), np.uint8) for _ in frames]
    with pytest.raises(ValueError, match="shapes differ"):
        list(FrameCopies(2, 1).start(targets, frames))
    assert slow.begun.is_set()
    assert slow.writing == 0


def test_a_reader_that_leaves_early_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = _Slow()
    monkeypatch.setattr(frame_copies, "np", slow)
    frames = _frames(4, 16, 16, "rows", 0)
    copies = FrameCopies(2, 8)
    for leave in ("at once", "behind the first"):
        targets = [np.zeros((16, 16, 3), np.uint8) for _ in frames]
        copying = copies.start(targets, frames)
        if leave == "behind the first":
            pieces = iter(copying)
            next(pieces)
            assert slow.begun.is_set()
            pieces.close()  # type: ignore[attr-defined]
        copying.wait()
        assert slow.writing == 0
        np.testing.assert_array_equal(targets, frames)


def test_threads_end_with_their_owner() -> None:
    before = set(threading.enumerate())
    copies = FrameCopies(2, 2)
    frames = _frames(1, 8, 8, "rows", 0)
    assert len(list(copies.start([np.zeros((8, 8, 3), np.uint8)], frames))) == 2
    own = set(threading.enumerate()) - before
    assert len(own) == min(2, os.cpu_count() or 1) - 1
    del copies
    for thread in own:
        thread.join(5)
    assert not any(thread.is_alive() for thread in own)
