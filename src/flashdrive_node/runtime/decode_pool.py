"""Decodes frames in threads of its own, each frame once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from flashdrive_node.runtime.decode import DecodeError, decode_image, signature
from flashdrive_node.runtime.frames import Frame
from flashdrive_node.runtime.rig import Rig


class DecodePool:
    """One or two threads that fill ``pixels`` and ``signature``, or ``error``, of frames. Safe from any thread.

    OpenCV releases the GIL while it decodes, so the threads that receive messages keep running.
    """

    def __init__(self, rig: Rig, threads: int = 2, max_pixels: int = 4096 * 4096):
        self._specs = {camera.index: camera for camera in rig.cameras}
        self._max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._lock = Lock()
        self.decoded = 0

    def schedule(self, frame: Frame) -> Future[None]:
        """Decode a frame unless that has been asked for already."""
        with self._lock:
            if frame.decoding is None:
                frame.decoding = self._pool.submit(self._decode, frame)
            return frame.decoding

    def when_decoded(self, frames: Sequence[Frame], then: Callable[[], None]) -> None:
        """Call ``then`` once all frames have pixels or an error: from a decoding thread, or at once from this one."""
        futures = {self.schedule(frame) for frame in frames}
        remaining = len(futures)

        def done(_: Future[None]) -> None:
            nonlocal remaining
            with self._lock:
                remaining -= 1
                last = remaining == 0
            if last:
                then()

        for future in futures:
            future.add_done_callback(done)

    def close(self) -> None:
        """Finish what is being decoded, drop the rest, and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _decode(self, frame: Frame) -> None:
        raw = frame.raw
        if raw is None or (frame.evicted and not frame.pending):
            return  # removed before its turn came, no window holds it
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
