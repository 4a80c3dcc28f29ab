"""Copies of frames into page-locked memory by a few threads, handed on piece by piece.

PyTorch's own copy divides a frame among all cores and waits for the last of them, which makes single windows late by
many milliseconds on a machine that does other work too. Few threads wait for less, and the upload of a piece runs
beside the copies of the next ones.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Threads: one reaches two fifths of what six do, and more gain nothing (host of an H200, 4 frames of 1920 x 1080).
THREADS = 6
#: Pieces of a frame: those of four frames go evenly into six threads.
PIECES = 3

Pixels = NDArray[np.uint8]


class Piece(NamedTuple):
    """Rows of a frame that have been copied."""

    frame: int
    rows: slice


class _Copy(NamedTuple):
    """One copy that is to be made, and who is told: with nothing, or with what went wrong."""

    piece: Piece
    target: Pixels
    source: Pixels
    done: SimpleQueue[tuple[Piece, Exception | None]]

    def make(self) -> None:
        try:
            np.copyto(self.target, self.source)
        except Exception as error:
            self.done.put((self.piece, error))
        else:
            self.done.put((self.piece, None))


class Copying:
    """Copies that are being made. Its targets are written to until it has been gone through or waited for."""

    def __init__(self, copies: SimpleQueue[_Copy | None], pieces: Sequence[tuple[Piece, Pixels, Pixels]]):
        self._copies = copies
        self._done: SimpleQueue[tuple[Piece, Exception | None]] = SimpleQueue()
        self._left = len(pieces)
        for piece, target, source in pieces:
            copies.put(_Copy(piece, target, source, self._done))

    def __iter__(self) -> Iterator[Piece]:
        """Pieces as they are there. An error, such as of a frame that does not fit, is raised behind the last copy."""
        try:
            while self._left:
                piece, error = self._next()
                if error is not None:
                    raise error
                yield piece
        finally:
            self.wait()

    def wait(self) -> None:
        """Until nobody writes to the targets any more."""
        while self._left:
            self._next()

    def _next(self) -> tuple[Piece, Exception | None]:
        """What is there next; makes a copy that nobody has begun meanwhile."""
        try:
            copy = self._copies.get_nowait()
        except Empty:
            copy = None
        if copy is not None:
            copy.make()
        piece, error = self._done.get()
        self._left -= 1
        return piece, error


class FrameCopies:
    """Threads that copy frames, with the one that waits for them among them.

    Queues written in C in place of an executor's futures: handing over eight pieces takes 0.2 ms less.
    """

    def __init__(self, threads: int = THREADS, pieces: int = PIECES):
        """Start the threads; they end with this object.

        Args:
            threads: At most, with the caller's; no more than the machine has cores.
            pieces: Of a frame.
        """
        self._pieces = pieces
        self._copies: SimpleQueue[_Copy | None] = SimpleQueue()
        others = min(threads, os.cpu_count() or 1) - 1
        for number in range(others):
            Thread(target=_work, args=(self._copies,), name=f"frame-copies-{number}", daemon=True).start()
        weakref.finalize(self, _end, self._copies, others)

    def start(self, targets: Sequence[Pixels], frames: Sequence[Pixels]) -> Copying:
        """Begin to copy each frame [height, width, 3] to its target."""
        pieces: list[tuple[Piece, Pixels, Pixels]] = []
        for number, frame in enumerate(frames):
            step = -(-len(frame) // self._pieces) or 1
            for first in range(0, len(frame), step):
                rows = slice(first, first + step)
                pieces.append((Piece(number, rows), targets[number][rows], frame[rows]))
        return Copying(self._copies, pieces)


def _work(copies: SimpleQueue[_Copy | None]) -> None:
    while (copy := copies.get()) is not None:
        copy.make()


def _end(copies: SimpleQueue[_Copy | None], threads: int) -> None:
    for _ in range(threads):
        copies.put(None)
