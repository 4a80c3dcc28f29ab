"""Windows that lie to the engine: an evaluation that does not punish a model for them measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from flashdrive_node.engine.protocol import CameraFrames, Observation, Prediction
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.clip import Clip, ClipSource, Window
from flashdrive_node.model.errors import InputError

#: cameras: every camera shows what the next one sees. history: the ego has stood still. blind: all pictures are grey.
#: cache: the observations are true, and what a `BlankedEngine` has kept of earlier ones is lost.
CACHE = "cache"
KINDS = ("cameras", "history", "blind", CACHE)


class BlankedEngine(StreamingEngine):
    """A streaming engine in mode "kv" whose kept keys and values are zeroed in front of every window."""

    def __init__(self, settings: PlainSettings):
        """Take the settings of such an engine.

        Raises:
            InputError: They are of an engine that keeps no keys and values.
        """
        if not isinstance(settings, StreamingSettings) or settings.stream.mode != "kv":
            raise InputError("--sabotage cache: --engine streaming --stream-mode kv is required, found another engine")
        super().__init__(settings)

    def step(self, observation: Observation) -> Prediction:
        """Answer one observation."""
        if self.stream is not None:
            self.stream.blank()
        return super().step(observation)


class SabotagedClips:
    """The clips of another source with one thing wrong in every observation; truth and names stay."""

    def __init__(self, source: ClipSource, kind: str):
        """Keep the source; `kind` is one of `KINDS`.

        Raises:
            InputError: Unknown kind.
        """
        if kind not in KINDS:
            raise InputError(f"--sabotage must be one of {', '.join(KINDS)}, found {kind!r}")
        self.source, self.kind = source, kind
        self.name = f"{source.name}, sabotaged: {kind}"
        self.camera_indices = source.camera_indices

    def __len__(self) -> int:
        return len(self.source)

    def clips(self) -> Iterator[Clip]:
        """The source's clips."""
        for clip in self.source.clips():
            windows = clip.windows
            clip.windows = (Window(sabotaged(w.observation, self.kind), w.truth) for w in windows)
            yield clip


def sabotaged(observation: Observation, kind: str) -> Observation:
    """An observation with one thing wrong, see `KINDS`.

    Raises:
        InputError: Cameras of different sizes cannot be exchanged.
    """
    if kind == CACHE:
        return observation
    if kind == "history":
        still = np.zeros_like(observation.ego_history_xyz)
        turned = np.tile(np.eye(3, dtype=np.float32), (len(still), 1, 1))
        return replace(observation, ego_history_xyz=still, ego_history_rot=turned)
    cameras = observation.cameras
    if kind == "blind":
        images = [tuple(np.full_like(image, 127) for image in camera.images) for camera in cameras]
    else:
        sizes = {image.shape for camera in cameras for image in camera.images}
        if len(sizes) > 1:
            raise InputError(f"cameras of one size are required for exchanging them, found {sorted(sizes)}")
        images = [camera.images for camera in (*cameras[1:], cameras[0])]
    shown = zip(cameras, images, strict=True)
    return replace(observation, cameras=tuple(CameraFrames(c.camera_index, c.stamps_ns, seen) for c, seen in shown))
