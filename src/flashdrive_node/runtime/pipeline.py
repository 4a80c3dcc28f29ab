"""Joins buffer, ego history, decoding and worker: messages go in as plain data, deliveries come out of one callback."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock

from flashdrive_node.engine.protocol import Engine
from flashdrive_node.runtime.assembly import build_observation
from flashdrive_node.runtime.decode_pool import DecodePool
from flashdrive_node.runtime.delivery import Delivery
from flashdrive_node.runtime.ego_history import EgoHistory, EgoWindow
from flashdrive_node.runtime.frames import DropCause, Frame, FrameWindow, Refusal
from flashdrive_node.runtime.observation import OdometrySample, RawImage
from flashdrive_node.runtime.outcome import Outcome, State
from flashdrive_node.runtime.pipeline_settings import PipelineSettings
from flashdrive_node.runtime.pipeline_status import (
    CameraStatus,
    InputNotes,
    PipelineStatus,
    drop_complaint,
    silent_input,
)
from flashdrive_node.runtime.rig import Rig
from flashdrive_node.runtime.ring_buffer import RingBuffer
from flashdrive_node.runtime.worker import EngineWorker

logger = logging.getLogger(__name__)

#: One late frame is jitter of the transport; so many in a row are a fault of the camera.
DISORDER_REPORTED = 3


@dataclass(eq=False)
class _Claim:
    """A window on its way from choice to outcome."""

    window: FrameWindow
    ego: EgoWindow
    epoch: int
    chosen_ns: int
    submitted_ns: int = 0


class Pipeline:
    """Everything between messages and deliveries. Input methods store and return at once; safe from any thread.

    ``on_delivery`` is called from the worker thread (for windows that never started: from a decoding or a resetting
    one): it must only hand over, for example append to a deque and trigger a guard condition. Windows are chosen when
    a message may have completed one, and decoded one at a time: what becomes complete meanwhile competes afterwards,
    the newest first.
    """

    def __init__(
        self,
        rig: Rig,
        make_engine: Callable[[], Engine],
        on_delivery: Callable[[Delivery], None],
        settings: PipelineSettings | None = None,
        on_state: Callable[[State], None] | None = None,
    ):
        self.rig = rig
        self.settings = settings = settings or PipelineSettings()
        self._on_delivery = on_delivery
        self._ring = RingBuffer(rig, settings.window)
        self._ego = EgoHistory(settings.ego, rig.base_frame)
        self._pool = DecodePool(rig, settings.decode_threads, settings.max_pixels)
        self.worker = EngineWorker(
            make_engine, self._on_outcome, on_state, settings.hang_timeout_s, settings.reload_after_failures
        )
        self._notes = {camera.index: InputNotes() for camera in rig.cameras}
        self._odometry_notes = InputNotes()
        self._frozen: dict[int, bool] = {camera.index: False for camera in rig.cameras}
        self._sizes: dict[int, tuple[int, int]] = {}
        self._nav_text: str | None = None
        self._active = False
        self._epoch = 0
        self._decoding: _Claim | None = None
        self._claims: dict[int, _Claim] = {}
        self._window_id = 0
        self._last_t0_ns: int | None = None
        self._refusal: Refusal | None = Refusal("inactive", "not active")
        self._resets: Counter[str] = Counter()
        self._last_reset = ""
        # Taken before the locks of the parts and never while one of them is held.
        self._lock = RLock()

    @property
    def epoch(self) -> int:
        """Counts resets of the stream: a delivery of another epoch is out of date, even if it was on its way before."""
        return self._epoch

    def start(self) -> None:
        """Load and warm the engine up in its thread; returns at once."""
        self.worker.start()

    def set_active(self, active: bool) -> None:
        """Windows are only formed while active; inactive, images are counted and dropped."""
        with self._lock:
            if active == self._active:
                return
            self._active = active
            self._refusal = Refusal("waiting", "waiting for frames") if active else Refusal("inactive", "not active")
            self._reset_stream("activated" if active else "deactivated")

    def on_image(self, camera_index: int, image: RawImage, now_ns: int | None = None) -> None:
        """Take one image; ``now_ns`` is the node's clock."""
        notes, spec = self._notes[camera_index], self.rig.camera(camera_index)
        if not self._active:
            self._ring.count_drop(camera_index, "inactive")
            return
        if len(image.data) > spec.max_bytes:
            self.refuse_image(
                camera_index, f"image must have at most {spec.max_bytes} bytes, found {len(image.data)}", "invalid"
            )
            return
        insertion = self._ring.insert(camera_index, image, now_ns)
        if insertion.jumped_back_s is not None:
            self.reset("clock_jump", f"stamps of camera {spec.name} went back by {insertion.jumped_back_s:.3f} s")
            insertion = self._ring.insert(camera_index, image, now_ns)
        if insertion.frame is None:
            notes.complain(drop_complaint(insertion.dropped, image.stamp_ns, now_ns))
            return
        notes.received_ns = image.received_ns
        if insertion.disorder >= DISORDER_REPORTED:
            notes.complain(f"stamps do not increase: the last {insertion.disorder} came before the newest one")
        frame = insertion.frame
        if self.worker.ready and self._ring.wanted(frame):
            if self.settings.ingest:
                self._pool.when_decoded([frame], lambda: self._offer_ahead(frame))
            else:
                self._pool.schedule(frame)
        self._advance(now_ns)

    def refuse_image(self, camera_index: int, text: str, cause: DropCause = "invalid") -> None:
        """Count an image that the node could not even convert, and report why."""
        self._ring.count_drop(camera_index, cause)
        self._notes[camera_index].complain(text)

    def on_odometry(self, sample: OdometrySample, now_ns: int | None = None) -> None:
        """Take one odometry sample; may complete a window that waited for it. ``now_ns`` is the node's clock."""
        conspicuous = self._ego.insert(sample, now_ns)
        if conspicuous is not None and conspicuous.reason == "clock_jump":
            self.reset("clock_jump", conspicuous.text)
            conspicuous = self._ego.insert(sample, now_ns)
        if conspicuous is not None:
            self._odometry_notes.complain(conspicuous.text)
            if conspicuous.reason != "frame_change":
                return
        self._odometry_notes.received_ns = time.monotonic_ns()
        self._advance()

    def set_navigation(self, text: str | None) -> None:
        """Navigation instruction of the windows from now on."""
        self._nav_text = text

    def reset(self, reason: str, text: str = "") -> None:
        """Forget frames, history and streaming state; results of earlier windows are discarded.

        Args:
            reason: What the reset is counted under, for example "clock_jump", "service".
            text: Details for the log and for diagnostics.
        """
        with self._lock:
            self._ego.reset()
            self._ring.reset()
            self._reset_stream(reason, text)

    def status(self) -> PipelineStatus:
        """Snapshot for diagnostics."""
        accounts, rates = self._ring.accounts(), self._ring.rates_hz()
        cameras = []
        for spec in self.rig.cameras:
            notes = self._notes[spec.index]
            cameras.append(
                CameraStatus(
                    name=spec.name,
                    index=spec.index,
                    account=accounts[spec.index],
                    rate_hz=rates[spec.index],
                    silent_s=notes.silent_s(),
                    frozen=self._frozen[spec.index],
                    last_error=notes.error,
                    last_error_age_s=notes.error_age_s(),
                )
            )
        return PipelineStatus(
            cameras=tuple(cameras),
            refusal=self._refusal or (silent_input(cameras, self._odometry_notes) if self._active else None),
            worker=self.worker.status(),
            odometry_received=self._ego.received,
            odometry_dropped=dict(self._ego.dropped),
            odometry_silent_s=self._odometry_notes.silent_s(),
            odometry_last_error=self._odometry_notes.error,
            odometry_last_error_age_s=self._odometry_notes.error_age_s(),
            windows_taken=self._window_id,
            resets=dict(self._resets),
            last_reset=self._last_reset,
        )

    def close(self, timeout_s: float = 10.0) -> bool:
        """End all threads; False where the engine's thread did not end in time."""
        with self._lock:
            self._active = False
            self._epoch += 1
        self._pool.close()
        return self.worker.close(timeout_s)

    def _advance(self, now_ns: int | None = None) -> None:
        """Claim the newest window that frames and odometry complete, unless one is being decoded."""
        with self._lock:
            if not self._active or self._decoding is not None:
                return
            if not self.worker.ready:
                self._refusal = Refusal("engine", f"the engine is {self.worker.status().state}")
                return
            limit_ns = self._ego.newest_usable_ns()
            if limit_ns is None:
                self._refusal = Refusal("odometry_missing", "no odometry received")
                return
            window = self._ring.newest_window(limit_ns, now_ns)
            while isinstance(window, FrameWindow) and self._discard_broken(window):
                window = self._ring.newest_window(limit_ns, now_ns)
            if isinstance(window, Refusal):
                self._note_refusal(window, limit_ns)
                return
            ego = self._ego.history_at(window.t0_ns)
            if isinstance(ego, Refusal):
                # Not claimed: the next odometry sample may complete it.
                self._refusal = ego
                return
            self._ring.take(window)
            self._decoding = claim = _Claim(window, ego, self._epoch, time.monotonic_ns())
        self._pool.when_decoded(window.frames, lambda: self._decoded(claim))

    def _offer_ahead(self, frame: Frame) -> None:
        """Give a decoded frame to the engine, unless a window that holds it is on its way there already."""
        with self._lock:
            if self._active and not frame.pending and not frame.evicted and frame.pixels is not None:
                self.worker.ingest(frame.camera_index, frame.stamp_ns, frame.pixels)

    def _discard_broken(self, window: FrameWindow) -> bool:
        """Remove the frames that could not be decoded; whether there were any."""
        broken = [frame for frame in window.frames if frame.error is not None]
        for frame in broken:
            error, spec = frame.error or "", self.rig.camera(frame.camera_index)
            self._ring.discard(frame, error)
            self._notes[frame.camera_index].complain(error)
            self._refusal = Refusal("corrupt", f"camera {spec.name}: {error}", spec.name)
        return bool(broken)

    def _note_refusal(self, refusal: Refusal, limit_ns: int) -> None:
        if refusal.reason == "waiting":
            newest_ns = self._ring.newest_reference_ns()
            if newest_ns is not None and newest_ns - limit_ns > self.settings.ego.max_gap_s * 1e9:
                text = f"newest odometry is {(newest_ns - limit_ns) / 1e6:.0f} ms older than the newest frame"
                self._refusal = Refusal("odometry_wait", text)
            # Between two windows there is always something to wait for: that is no reason to report.
            return
        self._refusal = refusal

    def _decoded(self, claim: _Claim) -> None:
        with self._lock:
            self._decoding = None
            if claim.epoch != self._epoch:
                self._ring.resolve(claim.window, used=False, lost="reset")
            elif self._discard_broken(claim.window):
                # Where the cameras are fast, a frame beside the broken one makes a window soon.
                self._ring.withdraw(claim.window)
            elif not self._submit(claim):
                self._ring.resolve(claim.window, used=False, lost="refused")
        self._advance()

    def _submit(self, claim: _Claim) -> bool:
        """Hand a decoded window to the worker; False where nothing came of it."""
        window = claim.window
        refusal = self._frozen_camera(window) or self._changed_size(window)
        if refusal is not None:
            self._refusal = refusal
            return False
        gap_s = 0.0 if self._last_t0_ns is None else (window.t0_ns - self._last_t0_ns) / 1e9
        if gap_s > self.settings.max_t0_gap_s:
            self._count_reset("gap", f"{gap_s:.2f} s without a window")
            self.worker.reset("gap")
        self._last_t0_ns = window.t0_ns
        self._window_id += 1
        observation = build_observation(self._window_id, window, claim.ego, self._nav_text)
        claim.submitted_ns = time.monotonic_ns()
        self._claims[observation.window_id] = claim
        if not self.worker.submit(observation):
            del self._claims[observation.window_id]
            self._refusal = Refusal("engine", f"the engine is {self.worker.status().state}")
            return False
        self._refusal = None
        return True

    def _frozen_camera(self, window: FrameWindow) -> Refusal | None:
        frozen = [camera for camera in window.cameras if camera.frozen]
        self._frozen = {camera.index: camera.frozen for camera in window.cameras}
        if not frozen or not self.settings.refuse_frozen:
            return None
        names = ", ".join(camera.name for camera in frozen)
        return Refusal("frozen", f"camera {names} repeats the same picture in all frames of the window", frozen[0].name)

    def _changed_size(self, window: FrameWindow) -> Refusal | None:
        for camera in window.cameras:
            sizes = [frame.pixels.shape[1::-1] for frame in camera.frames if frame.pixels is not None]
            if len(set(sizes)) > 1:
                text = f"camera {camera.name} changes its size within the window: {sizes[0]} to {sizes[-1]}"
                return Refusal("size_change", text, camera.name)
        for camera in window.cameras:
            pixels = camera.frames[-1].pixels
            assert pixels is not None
            size = (pixels.shape[1], pixels.shape[0])
            before = self._sizes.setdefault(camera.index, size)
            if before != size:
                self._sizes[camera.index] = size
                self._count_reset("size_change", f"camera {camera.name} changed its size from {before} to {size}")
                self.worker.reset("size_change")
        return None

    def _on_outcome(self, outcome: Outcome) -> None:
        observation = outcome.observation
        with self._lock:
            claim = self._claims.pop(observation.window_id)
            lost: DropCause = "superseded" if outcome.kind == "superseded" else "reset"
            self._ring.resolve(claim.window, used=outcome.started_ns > 0, lost=lost)
        window = claim.window
        self._on_delivery(
            Delivery(
                kind=outcome.kind,
                window_id=observation.window_id,
                t0_ns=observation.t0_ns,
                prediction=outcome.prediction,
                observation=observation,
                ego=claim.ego,
                epoch=claim.epoch,
                stamps_ns={camera.name: camera.stamps_ns for camera in window.cameras},
                text=outcome.text,
                received_ns=window.received_ns,
                chosen_ns=claim.chosen_ns,
                submitted_ns=claim.submitted_ns,
                started_ns=outcome.started_ns,
                finished_ns=outcome.finished_ns,
            )
        )

    def _reset_stream(self, reason: str, text: str = "") -> None:
        self._epoch += 1
        self._last_t0_ns = None
        self._count_reset(reason, text)
        self.worker.reset(reason)

    def _count_reset(self, reason: str, text: str) -> None:
        self._resets[reason] += 1
        self._last_reset = f"{reason}: {text}" if text else reason
        logger.info("reset: %s", self._last_reset)
