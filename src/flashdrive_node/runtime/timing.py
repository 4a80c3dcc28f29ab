"""Rolling statistics of stage times."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import Lock


@dataclass(frozen=True)
class StageStatistics:
    """Times of one stage over the last windows, milliseconds."""

    count: int
    last_ms: float
    p50_ms: float
    p99_ms: float
    max_ms: float


class StageTimings:
    """Times by stage name, each over its last ``window`` values. Safe to call from any thread."""

    def __init__(self, window: int = 1000):
        self._window = window
        self._values: dict[str, deque[float]] = {}
        self._counts: dict[str, int] = {}
        self._lock = Lock()

    def add(self, times_ms: dict[str, float]) -> None:
        """Add one value per stage."""
        with self._lock:
            for stage, value in times_ms.items():
                self._values.setdefault(stage, deque(maxlen=self._window)).append(value)
                self._counts[stage] = self._counts.get(stage, 0) + 1

    def statistics(self) -> dict[str, StageStatistics]:
        """Statistics of every stage in order of first appearance; ``count`` is of all values ever added."""
        with self._lock:
            values = {stage: (self._counts[stage], list(queue)) for stage, queue in self._values.items()}
        result = {}
        for stage, (count, times) in values.items():
            ordered = sorted(times)
            result[stage] = StageStatistics(
                count, times[-1], percentile(ordered, 0.5), percentile(ordered, 0.99), ordered[-1]
            )
        return result


def percentile(ordered: list[float], fraction: float) -> float:
    """Nearest-rank percentile of sorted values.

    Raises:
        ValueError: No values, or a fraction outside 0 to 1.
    """
    if not ordered or not 0 <= fraction <= 1:
        raise ValueError(f"percentile needs values and a fraction of 0 to 1, got {len(ordered)} and {fraction}")
    return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]
