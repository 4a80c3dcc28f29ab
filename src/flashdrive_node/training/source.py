"""An endless supply of windows: drives are computed by processes beside the one that owns the GPU."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from flashdrive_node.training.drives import DriveJob, windows_of
from flashdrive_node.training.windows import Windows, map_leaves


class WindowSource(Iterator[Windows]):
    """Windows of one job after the other, in the order of the jobs whoever finishes first."""

    def __init__(self, first: DriveJob, workers: int, rank: int = 0, ranks: int = 1):
        """Start the workers.

        Args:
            first: The first job; the next ones take the scenes behind it.
            workers: Processes; 0 computes in this one.
            rank, ranks: This process takes every ranks-th job, so that no two share a scene.
        """
        self._job = replace(first, first=first.first + rank * first.scenes)
        self._stride = ranks * first.scenes
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[Future[Windows]] = deque()
        if workers:
            # Forking a process that holds a GPU or threads is not safe.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)
            for _ in range(2 * workers):
                self._submit(self._pool)

    def _submit(self, pool: ProcessPoolExecutor) -> None:
        self._pending.append(pool.submit(_arrays_of, self._job))
        self._job = replace(self._job, first=self._job.first + self._stride)

    def __next__(self) -> Windows:
        if self._pool is None:
            job = self._job
            self._job = replace(job, first=job.first + self._stride)
            return windows_of(job)
        arrays = self._pending.popleft().result()
        self._submit(self._pool)
        return map_leaves(arrays, torch.from_numpy)

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _one_thread() -> None:
    torch.set_num_threads(1)


def _arrays_of(job: DriveJob) -> Windows:
    """The windows with arrays for tensors: those go through a pipe, tensors would each take a file descriptor."""
    return map_leaves(windows_of(job), lambda t: np.ascontiguousarray(t.numpy()))
