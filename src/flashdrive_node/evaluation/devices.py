"""Work on many scenes, spread over the devices of one machine: one process per device, results in order."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
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
    return spread_each({"": work}, indices, devices, title)


def spread_each(
    works: Mapping[str, Work[Result]], indices: Sequence[int], devices: Sequence[str], title: str
) -> list[Result]:
    """Do several works for all scenes, as many jobs at a time as there are devices.

    A job is one work, for an equal run of the scenes where devices outnumber works. So what does not get faster with
    fewer scenes at once, as small networks on GPUs, is done side by side.

    Args:
        works: By name, for the progress bars.
        indices: Of the scenes.
        devices: torch devices, each of which may come several times.
        title: Of the progress bars.

    Returns:
        Results work by work, each in the order of its scenes.
    """
    if len(devices) == 1 or len(works) * len(indices) <= 1:
        titled = [(f"{title} {name}".strip(), work) for name, work in works.items()]
        return [result for name, work in titled for result in _shard(work, indices, devices[0], name, 0)]
    parts = min(max(1, len(devices) // len(works)), max(len(indices), 1))
    ends = [round(len(indices) * i / parts) for i in range(parts + 1)]
    runs = [indices[first:last] for first, last in itertools.pairwise(ends)]
    # A process that holds a GPU cannot be forked. Each takes its share of the cores, and no more.
    context, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // len(devices))
    free = context.Queue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(len(devices), mp_context=context, initializer=_settle, initargs=(free, threads)) as pool:
        jobs = [
            pool.submit(_job, work, run, f"{title} {name}".strip(), number)
            for number, ((name, work), run) in enumerate(itertools.product(works.items(), runs))
        ]
        return [result for job in jobs for result in job.result()]


#: Of this process, where it is one of `spread_each`.
_own_device = "cpu"


def _settle(free: multiprocessing.Queue[str], threads: int) -> None:
    """Take one of the free devices."""
    global _own_device
    torch.set_num_threads(threads)
    _own_device = free.get()


def _job(work: Work[Result], indices: Sequence[int], title: str, position: int) -> Sequence[Result]:
    return _shard(work, indices, _own_device, f"{title} {_own_device}", position)


def _shard(work: Work[Result], indices: Sequence[int], device: str, title: str, position: int) -> Sequence[Result]:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with tqdm(total=work.total(indices), desc=title, position=position, unit="step", mininterval=1.0) as bar:
        return work(indices, device, bar.update)
