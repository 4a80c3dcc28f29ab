"""An engine without a model: drives on at constant speed and yaw rate, and fails on demand. For tests and demos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flashdrive_node.engine.protocol import EngineInfo, Observation, Prediction, Progress

Fault = Literal["none", "slow", "raise", "hang", "out_of_memory", "nan", "short", "jump"]
FAULTS: tuple[Fault, ...] = ("none", "slow", "raise", "hang", "out_of_memory", "nan", "short", "jump")


@dataclass(frozen=True)
class FakeSettings:
    """How the fake engine behaves."""

    #: Time that a step takes.
    latency_s: float = 0.05
    #: Time that a step takes under the fault "slow".
    slow_latency_s: float = 0.5
    load_s: float = 0.0
    warm_up_s: float = 0.0
    samples: int = 1
    #: Called with every observation; its figures go into ``Prediction.metrics``. Also as "package.module:function".
    probe: Callable[[Observation], dict[str, float]] | str | None = None


class FakeEngine:
    """Engine protocol without networks. ``set_fault`` and ``set_latency`` may be called from any thread."""

    def __init__(self, settings: FakeSettings | None = None):
        raise NotImplementedError

    def set_fault(self, fault: Fault) -> None:
        """Switch a fault on ("none": off); a hanging step is released by any change."""
        raise NotImplementedError

    def set_latency(self, latency_s: float) -> None:
        """Time of the steps from now on."""
        raise NotImplementedError

    def load(self, progress: Progress | None = None) -> EngineInfo:
        """Wait for the configured time, reporting progress."""
        raise NotImplementedError

    def warm_up(self, progress: Progress | None = None) -> None:
        """Wait for the configured time."""
        raise NotImplementedError

    def step(self, observation: Observation) -> Prediction:
        """Constant speed and yaw rate, both measured from the ego history."""
        raise NotImplementedError

    def reset(self, reason: str) -> None:
        """Count the windows of the stream from one again."""
        raise NotImplementedError

    def close(self) -> None:
        """Release a hanging step."""
        raise NotImplementedError
