"""Times the stages of one step. On a GPU with events, so that measuring never makes the host wait."""

from __future__ import annotations

import time

import torch


class StageTimer:
    """Stopwatch with named laps; one object per step."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.start_s = time.perf_counter()
        self.names: list[str] = []
        self.marks: list[torch.cuda.Event | float] = []
        self._record()

    def _record(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def lap(self, name: str) -> None:
        """End the stage `name`, which began at the last lap."""
        self.names.append(name)
        self._record()

    def finish(self) -> dict[str, float]:
        """Milliseconds per stage and "total" by the host's clock. Call when the step's result is on the host."""
        total_ms = (time.perf_counter() - self.start_s) * 1e3
        stages = {}
        for name, a, b in zip(self.names, self.marks[:-1], self.marks[1:], strict=True):
            if isinstance(a, float) and isinstance(b, float):
                stages[name] = (b - a) * 1e3
            elif isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event):
                b.synchronize()
                stages[name] = a.elapsed_time(b)
        return {**stages, "total": total_ms}
