"""CUDA graphs of the engine's stages: hundreds of kernels by one launch, over buffers that stay where they are."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    """What is known of one key."""

    #: One behind the other; none until they are captured.
    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    #: Why it is run without a graph, once that is settled.
    refused: str | None = None


class Graphs:
    """Runs functions, as CUDA graphs where the device has them.

    A key's first run is an ordinary one, which also sets up whatever the libraries need; its second is captured, and
    all further runs are replays. On other devices, and where a capture fails, functions are simply called.

    A function takes and returns nothing: it reads and writes tensors that live as long as its graph, decides nothing by
    their contents on the host, and has no other effect. What it allocates is gone when it returns, because all graphs
    share one pool of memory.

    Launching a graph takes the host time for every kernel, and behind other work the device begins with it only when
    all of it has been launched. So a function that the device would wait for says where its graph may be cut (`cut`):
    a short one in front is under way while the rest is being launched.
    """

    def __init__(self, device: torch.device, enabled: bool = True, limit: int = 64):
        """At most `limit` graphs are kept; the one that was not used for longest goes first."""
        self.enabled = enabled and device.type == "cuda"
        self.device = device
        self.limit = limit
        #: Captures so far and the seconds they took, for diagnostics.
        self.captures = 0
        self.capture_s = 0.0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._pool: Any = None  # a handle, of a type that PyTorch does not name
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._stream: torch.cuda.Stream | None = None
        # Of the capture that is under way.
        self._parts: list[torch.cuda.CUDAGraph] = []

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Run `function`; `key` names it and everything on the host that it depends on."""
        if not self.enabled:
            function()
            return
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry()
            if len(self._entries) > self.limit:
                _, oldest = self._entries.popitem(last=False)
                if oldest.graphs:
                    torch.cuda.synchronize(self.device)  # it may be running
            function()
            return
        self._entries.move_to_end(key)
        if not entry.graphs and entry.refused is None:
            self._capture(key, entry, function)
        if not entry.graphs:
            function()
        for graph in entry.graphs:
            graph.replay()

    def cut(self) -> None:
        """Called by a function that `run` was given: where it is captured, what follows becomes another graph."""
        if self._parts:
            self._parts[-1].capture_end()
            self._begin()

    def clear(self) -> None:
        """Forget all graphs. Call before buffers that they use are freed."""
        if self._entries and self.enabled:
            torch.cuda.synchronize(self.device)
        self._entries.clear()

    @property
    def refused(self) -> dict[Hashable, str]:
        """Keys that run without a graph because their capture failed, and why."""
        return {key: entry.refused for key, entry in self._entries.items() if entry.refused is not None}

    def _capture(self, key: Hashable, entry: _Entry, function: Callable[[], None]) -> None:
        start_s = time.perf_counter()
        if self._pool is None or not any(other.graphs for other in self._entries.values()):
            # A pool dies with its last graph, and its handle cannot be used again.
            self._pool = torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                self._begin()
                try:
                    function()
                finally:
                    self._parts[-1].capture_end()
        except RuntimeError as error:
            entry.refused = str(error)
            self._abandon(self._parts[-1])
            torch.cuda.synchronize(self.device)
            logger.warning("no CUDA graph of %s, it runs step by step: %s", key, error)
        else:
            entry.graphs = self._parts
            self.captures += 1
            self.capture_s += time.perf_counter() - start_s
        finally:
            self._parts = []
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _begin(self) -> None:
        """Begin with the next graph of a capture."""
        self._parts.append(torch.cuda.CUDAGraph())
        # Other threads may allocate pinned memory meanwhile, which a global capture would forbid them.
        self._parts[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Let the allocator forget a capture that failed: it would refuse the next one into the same pool."""
        self._failed.append(graph)  # page-locked memory's allocator goes on asking it
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with suppress(RuntimeError):  # the capture has ended for the allocator already
            torch._C._cuda_endAllocateToPool(index, self._pool)
        self._pool = None


class Cuts:
    """Cuts the graph of passes through a stack of layers where its launch would hold the device up.

    Behind few layers, then behind more, then behind every pass: each part runs for longer than it takes to launch the
    next one.
    """

    #: Layers of the first pass behind which it is cut.
    FIRST = (3, 11)

    def __init__(self, graphs: Graphs, layers: int, passes: int = 1):
        """Of so many passes, one behind the other."""
        self._graphs, self._done = graphs, 0
        self._places = {*self.FIRST, *(layers * n for n in range(1, passes))} - {layers * passes}

    def behind(self, layer: int, value: Tensor) -> None:
        """Called behind every layer."""
        self._done += 1
        if self._done in self._places:
            self._graphs.cut()
