"""Work on many scenes, spread over the devices of one machine: one process per device, results in order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Protocol, TypeVar

import torch
from tqdm import tqdm

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
#: Told of so many steps done.
Progress = Callable[[int], object]


class Work(Protocol[Result_co]):
    """Something to do for some scenes on one device. It is sent to other processes, so it holds settings only."""

    def total(self, indices: Sequence[int]) -> int:
        """Steps of progress that these scenes take."""
        ...

    def __call__(self, indices: Sequence[int], device: str, progress: Progress) -> Sequence[Result_co]:
        """A result per scene or window; `progress` is told of every step done."""
        ...


def devices_of(name: str) -> list[str]:
    """Devices by name: "auto" is every GPU, or the CPU where there is none; else names with commas between."""
    if name != "auto":
        return name.split(",")
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def spread(work: Work[Result], indices: Sequence[int], devices: Sequence[str], title: str) -> list[Result]:
    """Do the work for all scenes, every device an equal run of them.

    Args:
        work: What to do.
        indices: Of the scenes.
        devices: torch devices; a single one works in this process.
        title: Of the progress bars.
    """
    devices = devices[: max(len(indices), 1)]
    if len(devices) == 1:
        return list(_shard(work, indices, devices[0], title, 0))
    ends = [round(len(indices) * i / len(devices)) for i in range(len(devices) + 1)]
    # A process that holds a GPU cannot be forked. Each takes its share of the cores, and no more.
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // len(devices))
    with ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        parts = [
            pool.submit(_shard, work, indices[first:last], device, f"{title} {device}", number)
            for number, (device, first, last) in enumerate(zip(devices, ends[:-1], ends[1:], strict=True))
        ]
        return [result for part in parts for result in part.result()]


def _shard(work: Work[Result], indices: Sequence[int], device: str, title: str, position: int) -> Sequence[Result]:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with tqdm(total=work.total(indices), desc=title, position=position, unit="step", mininterval=1.0) as bar:
        return work(indices, device, bar.update)
