"""One window with its outcome: what the pipeline hands to whoever publishes."""

from __future__ import annotations

from dataclasses import dataclass

from flashdrive_node.engine.protocol import Observation, Prediction
from flashdrive_node.runtime.ego_history import EgoWindow
from flashdrive_node.runtime.outcome import OutcomeKind


@dataclass(frozen=True, eq=False)
class Delivery:
    """One window that reached the worker, with everything that publishing needs."""

    kind: OutcomeKind
    window_id: int
    t0_ns: int
    prediction: Prediction | None
    #: What the engine saw; drop the delivery soon, its images are large.
    observation: Observation
    ego: EgoWindow
    #: ``Pipeline.epoch`` when the window was chosen: another one now means that a reset came in between.
    epoch: int
    #: Stamps that were used, by camera name, oldest first.
    stamps_ns: dict[str, tuple[int, ...]]
    #: Why there is no prediction, for every kind but "result".
    text: str
    #: Monotonic times: last frame of the window received, window chosen, decoded and submitted, step started, ended.
    received_ns: int
    chosen_ns: int
    submitted_ns: int
    started_ns: int
    finished_ns: int
