"""Rules of a pipeline, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashdrive_node.runtime.ego_history import EgoRule
from flashdrive_node.runtime.ring_buffer import WindowRule


@dataclass(frozen=True)
class PipelineSettings:
    """Rules of all parts."""

    window: WindowRule = field(default_factory=WindowRule)
    ego: EgoRule = field(default_factory=EgoRule)
    decode_threads: int = 2
    #: Largest image that is decoded, pixels.
    max_pixels: int = 4096 * 4096
    #: Refuse windows in which a camera shows the same picture in all its frames.
    refuse_frozen: bool = True
    #: A t0 this much later than the one before means that the stream is interrupted: the engine is reset.
    max_t0_gap_s: float = 1.0
    #: Give frames to the engine as they come, where it can take them ahead of their window.
    ingest: bool = False
    hang_timeout_s: float = 5.0
    reload_after_failures: int = 3
