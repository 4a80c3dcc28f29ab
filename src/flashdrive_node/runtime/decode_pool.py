"""Decodes frames in threads of its own, each frame once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from flashdrive_node.runtime.decode import DecodeError, decode_image, signature
from flashdrive_node.runtime.frames import Frame
from flashdrive_node.runtime.rig import Rig

logger = logging.getLogger(__name__)


class DecodePool:
    """One or two threads that fill ``pixels`` and ``signature``, or ``error``, of frames. Safe from any thread.

    OpenCV releases the GIL while it decodes, so the threads that receive messages keep running. Frames hold no
    futures: a future keeps its callbacks, they keep the window and it keeps the frames, and pictures in such a cycle
    would stay in memory until the garbage collector comes by.
    """

    def __init__(self, rig: Rig, threads: int = 2, max_pixels: int = 4096 * 4096):
        self._specs = {camera.index: camera for camera in rig.cameras}
        self._max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._lock = Lock()
        self._closing = False
        self.decoded = 0

    def schedule(self, frame: Frame) -> None:
        """Decode a frame unless that has been asked for already."""
        with self._lock:
            if frame.scheduled:
                return
            frame.scheduled = True
            if not self._closing:
                self._pool.submit(self._run, frame)
                return
        self._finish(frame)

    def when_decoded(self, frames: Sequence[Frame], then: Callable[[], None]) -> None:
        """Call ``then`` once all frames have been decoded or given up: from a decoding thread, or from this one."""
        for frame in frames:
            self.schedule(frame)
        with self._lock:
            missing = [frame for frame in frames if not frame.finished]
            remaining = len(missing)

            def finished() -> bool:
                """Called under the lock; whether this was the last of the frames."""
                nonlocal remaining
                remaining -= 1
                return remaining == 0

            for frame in missing:
                frame.waiting.append((finished, then))
        if not missing:
            then()

    def close(self) -> None:
        """Give up what is not decoded yet, whoever waits for it is called, and end the threads."""
        with self._lock:
            self._closing = True
        self._pool.shutdown(wait=True)

    def _run(self, frame: Frame) -> None:
        # Removed before its turn came: no window holds it.
        if not self._closing and not (frame.evicted and not frame.pending):
            self._decode(frame)
        self._finish(frame)

    def _finish(self, frame: Frame) -> None:
        with self._lock:
            frame.finished = True
            waiting, frame.waiting = frame.waiting, []
            due = [then for finished, then in waiting if finished()]
        for then in due:
            try:
                then()
            except Exception:
                # An executor would swallow it.
                logger.exception("frame at %d ns: what follows its decoding raised", frame.stamp_ns)

    def _decode(self, frame: Frame) -> None:
        raw = frame.raw
        if raw is None:
            raise ValueError(f"frame at {frame.stamp_ns} ns has no bytes to decode")
        spec = self._specs[frame.camera_index]
        try:
            frame.signature = signature(raw)
            frame.pixels = decode_image(raw, self._max_pixels, spec.width, spec.height)
        except DecodeError as error:
            frame.error = str(error)
        except Exception as error:
            # Whatever a codec raises must end as a refused frame, or its window would wait for ever.
            frame.error = f"{type(error).__name__}: {error}"
        frame.raw = None
        with self._lock:
            self.decoded += 1
