"""How fast the engine reasons with a drafter: its own windows, in the mode that is deployed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.protocol import Observation
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.loading import LoadedModel

#: Windows of a stream in front of those that are timed: every stage is captured by then.
WARM_UP = 4


@dataclass(frozen=True)
class DraftTiming:
    """Of the windows behind the first ones."""

    #: Median of the stage "decode", milliseconds.
    decode_ms: float
    tokens_per_s: float
    #: Tokens per round of all windows.
    accept_length: float
    windows: int


def time_drafter(
    loaded: LoadedModel, drafter: Drafter | None, settings: StreamingSettings, windows: Sequence[Observation]
) -> DraftTiming:
    """Step one stream.

    Args:
        loaded: The target.
        drafter: None decodes token by token.
        settings: Of the engine.
        windows: Of one stream, more than `WARM_UP`.
    """
    engine = StreamingEngine(settings, loaded, drafter)
    ms, tokens, rounds = [], [], []
    try:
        for number, window in enumerate(windows):
            prediction = engine.step(window)
            if number >= WARM_UP:
                ms.append(prediction.timings_ms["decode"])
                tokens.append(prediction.metrics["tokens"])
                rounds.append(prediction.metrics.get("draft_rounds", tokens[-1]))
    finally:
        engine.close()
    gained = sum(tokens) - len(tokens)
    return DraftTiming(float(np.median(ms)), 1e3 * sum(tokens) / sum(ms), gained / sum(rounds), len(ms))
