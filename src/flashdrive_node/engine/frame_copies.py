"""Copies of frames into page-locked memory by a few threads, handed on piece by piece.

PyTorch's own copy divides a frame among all cores and waits for the last of them, which makes single windows late by
many milliseconds on a machine that does other work too. Few threads wait for less, and the upload of a piece runs
beside the copies of the next ones.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Threads: one reaches two fifths of what six do, and more gain nothing (host of an H200, 4 frames of 1920 x 1080).
THREADS = 6
#: Pieces of a frame.
PIECES = 2


class Piece(NamedTuple):
    """Rows of a frame that have been copied."""

    frame: int
    rows: slice


class FrameCopies:
    """Threads that copy frames."""

    def __init__(self, threads: int = THREADS, pieces: int = PIECES):
        """Start no thread yet.

        Args:
            threads: At most; no more than the machine has cores.
            pieces: Of a frame.
        """
        self._pieces = pieces
        self._threads = ThreadPoolExecutor(min(threads, os.cpu_count() or 1), "frame-copies")

    def copy(
        self, targets: Sequence[NDArray[np.uint8]], frames: Sequence[NDArray[np.uint8]]
    ) -> Generator[Piece, None, None]:
        """Copy each frame [height, width, 3] to its target, and name pieces in order when they are there.

        An error ends it behind the last copy, so that nobody writes to the targets any more.
        """
        pieces = [
            Piece(number, slice(first, first + step))
            for number, frame in enumerate(frames)
            for step in (-(-len(frame) // self._pieces) or 1,)
            for first in range(0, len(frame), step)
        ]
        copies = [
            self._threads.submit(np.copyto, targets[piece.frame][piece.rows], frames[piece.frame][piece.rows])
            for piece in pieces
        ]
        try:
            for piece, copy in zip(pieces, copies, strict=True):
                copy.result()
                yield piece
        finally:
            for copy in copies:
                copy.cancel()
            for copy in copies:
                if not copy.cancelled():
                    copy.exception()
