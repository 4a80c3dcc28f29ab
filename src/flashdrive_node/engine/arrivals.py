"""New images of the coming window on their way into features: some come ahead of it, the others with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashdrive_node.engine.image_encoder import ImageEncoder, Upload
from flashdrive_node.engine.protocol import CameraFrames
from flashdrive_node.engine.stage_timer import StageTimer
from flashdrive_node.engine.vision_pass import copied, joined, split
from flashdrive_node.model.prompt import Prompt
from flashdrive_node.model.vision import VisionFeatures


class Encoded(NamedTuple):
    """A frame's features."""

    stamp_ns: int
    features: VisionFeatures


class NewImages(NamedTuple):
    """A window's new images, by their places among all."""

    places: Sequence[int]
    #: Features of those that came ahead.
    ready: dict[int, VisionFeatures]
    #: The others, and their upload.
    rest: list[int]
    upload: Upload | None


class Arrivals:
    """Brings frames to the device and through the vision tower."""

    def __init__(self, encoder: ImageEncoder):
        """Keep the encoder; no frame has come."""
        self.encoder = encoder
        #: By camera index: its frame of the coming window, if that came ahead and is not in the stream yet.
        self.waiting: dict[int, Encoded] = {}

    def take(self, camera_index: int, stamp_ns: int, image: NDArray[np.uint8]) -> None:
        """Encode a frame ahead of its window.

        Raises:
            InputError: A frame that cannot be used.
        """
        features = self.encoder.encode(self.encoder.upload([[image]]))
        # Copied: the next frame's go to the same place.
        self.waiting[camera_index] = Encoded(stamp_ns, copied(features))

    def begin(self, places: Sequence[int], prompt: Prompt, cameras: Sequence[CameraFrames]) -> NewImages:
        """Begin to upload a window's new images, but for those that came ahead.

        Args:
            places: Of the new images among all of the prompt, ascending.
            prompt: Of the window.
            cameras: Of the window.

        Raises:
            InputError: Frames that cannot be used.
        """
        ready: dict[int, VisionFeatures] = {}
        rest: list[int] = []
        frames_of: list[list[NDArray[np.uint8]]] = [[] for _ in cameras]
        for place in places:
            number, frame = divmod(place, prompt.frames_per_camera)
            camera = cameras[number]
            waiting = self.waiting.get(camera.camera_index)
            if waiting is not None and waiting.stamp_ns == camera.stamps_ns[frame]:
                ready[place] = waiting.features
            else:
                frames_of[number].append(camera.images[frame])
                rest.append(place)
        upload = self.encoder.start([frames for frames in frames_of if frames]) if rest else None
        return NewImages(places, ready, rest, upload)

    def features(self, new: NewImages, prompt: Prompt, timer: StageTimer) -> VisionFeatures | None:
        """Features of a window's new images in their order, None where there are none; nothing waits any more."""
        self.waiting.clear()
        if new.upload is None:
            return joined([new.ready[place] for place in new.places]) if new.places else None
        uploaded = self.encoder.finish(new.upload)
        timer.lap("images")
        features = self.encoder.encode(uploaded)
        timer.lap("encode")
        if not new.ready:
            return features
        parts = dict(zip(new.rest, split(features, [prompt.images[i].count for i in new.rest]), strict=True))
        return joined([(new.ready | parts)[place] for place in new.places])
