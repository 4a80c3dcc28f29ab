"""Per camera a time-ordered store of frames, and the choice of the frames that belong to one t0."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass
from threading import Lock

from flashdrive_node.runtime.frames import (
    CameraWindow,
    DropCause,
    Frame,
    FrameAccount,
    FrameWindow,
    Insertion,
    Refusal,
)
from flashdrive_node.runtime.observation import RawImage
from flashdrive_node.runtime.rig import CameraSpec, Rig


@dataclass(frozen=True)
class WindowRule:
    """How frames are chosen."""

    frames: int = 4
    #: Time between the frames of one camera.
    interval_s: float = 0.1
    #: Largest distance of a frame from its nominal time; at most half the interval.
    tolerance_s: float = 0.05
    #: Shortest time between successive t0 (nominal: half a period of the reference camera is granted for jitter).
    min_period_s: float = 0.1
    #: Frames older (newer) than the node's clock by more than this are dropped as stale (future).
    max_age_s: float = 2.0
    max_ahead_s: float = 0.5
    #: A stamp this far behind the newest one of its camera is a clock jump instead of a reordered frame.
    jump_back_s: float = 1.0
    #: How far the cameras may lag behind each other; frames are kept that much longer than a window is long.
    max_lag_s: float = 0.25


class _Store:
    """Frames of one camera in order of their stamps, and their account."""

    def __init__(self, spec: CameraSpec):
        self.spec = spec
        self.half_period_ns = round(0.5e9 / spec.rate_hz)
        self.stamps: list[int] = []
        self.frames: list[Frame] = []
        #: Newest stamp accepted, also where that frame turned out to be corrupt.
        self.newest_ns: int | None = None
        self.received = 0
        #: Stamps that were not after the newest one: in all, and in a row right now.
        self.non_increasing = 0
        self.disorder = 0
        self.used = 0
        self.dropped: Counter[str] = Counter()
        #: Evicted frames of windows that are under way.
        self.orphans = 0
        self.recent: deque[int] = deque(maxlen=20)

    def evict(self, first: int, last: int, cause: DropCause | None = None) -> None:
        """Remove frames[first:last] and settle what became of them; ``cause`` goes before their own."""
        for frame in self.frames[first:last]:
            frame.evicted = True
            if frame.pending:
                self.orphans += 1
            else:
                self.settle(frame, cause)
        del self.frames[first:last]
        del self.stamps[first:last]

    def settle(self, frame: Frame, cause: DropCause | None = None) -> None:
        if frame.used:
            self.used += 1
        elif frame.error is not None:
            self.dropped["corrupt"] += 1
        else:
            self.dropped[cause or frame.lost] += 1

    def nearest(self, target_ns: int) -> Frame | None:
        """Frame nearest to a time, the older of two equally near."""
        at = bisect_left(self.stamps, target_ns)
        if at == len(self.stamps):
            return self.frames[-1] if self.frames else None
        if at and target_ns - self.stamps[at - 1] <= self.stamps[at] - target_ns:
            return self.frames[at - 1]
        return self.frames[at]

    def rate_hz(self) -> float:
        span = max(self.recent) - min(self.recent) if len(self.recent) > 1 else 0
        return (len(self.recent) - 1) * 1e9 / span if span else 0.0


class RingBuffer:
    """Frames of all cameras of a rig. Safe to call from any thread.

    t0 is the stamp of a frame of the rig's reference camera. A window is complete where every camera has, for each of
    t0, t0 - interval, ..., a frame within the tolerance; the nearest is taken (the older of two equally near), and no
    frame serves two times. A camera whose newest frame is older than t0 by more than half its period is waited for,
    because its next frame will be nearer.
    """

    def __init__(self, rig: Rig, rule: WindowRule | None = None):
        self.rule = rule = rule or WindowRule()
        problems = []
        if rule.frames < 1 or rule.interval_s <= 0:
            problems.append(f"frames and interval_s must be above 0, found {rule.frames} and {rule.interval_s}")
        if not 0 < rule.tolerance_s <= rule.interval_s / 2:
            problems.append(
                f"tolerance_s must be above 0 and at most half of interval_s ({rule.interval_s / 2} s), "
                f"found {rule.tolerance_s}"
            )
        for camera in rig.cameras:
            if camera.rate_hz * rule.interval_s < 0.9:
                problems.append(
                    f"camera {camera.name!r}: frames {rule.interval_s} s apart need {1 / rule.interval_s:g} Hz, "
                    f"it has {camera.rate_hz:g} Hz"
                )
        if problems:
            raise ValueError(f"rig {rig.name!r}: " + "; ".join(problems))
        self._stores = {camera.index: _Store(camera) for camera in rig.cameras}
        self._reference = self._stores[rig.reference.index]
        self._interval_ns = round(rule.interval_s * 1e9)
        self._tolerance_ns = round(rule.tolerance_s * 1e9)
        self._span_ns = self._interval_ns * (rule.frames - 1) + self._tolerance_ns
        self._keep_ns = self._span_ns + round(rule.max_lag_s * 1e9)
        # Jitter of the reference camera must not cost a window: its frame one nominal period early still counts.
        min_period_ns = round(rule.min_period_s * 1e9)
        self._stride_ns = max(min_period_ns - min(self._reference.half_period_ns, min_period_ns // 2), 1)
        self._last_t0_ns: int | None = None
        self._before_last_ns: int | None = None
        self._lock = Lock()

    def insert(self, camera_index: int, image: RawImage, now_ns: int | None = None) -> Insertion:
        """Store one image. ``now_ns`` is the node's (ROS) clock; without it stamps are not compared with the clock."""
        stamp_ns, rule = image.stamp_ns, self.rule
        with self._lock:
            store = self._stores[camera_index]
            cause: DropCause | None = None
            if now_ns is not None and stamp_ns < now_ns - rule.max_age_s * 1e9:
                cause = "stale"
            elif now_ns is not None and stamp_ns > now_ns + rule.max_ahead_s * 1e9:
                cause = "future"
            elif (
                # Where the clock is known it tells of its jumps itself: then a wild stamp is only that.
                now_ns is None and store.newest_ns is not None and stamp_ns < store.newest_ns - rule.jump_back_s * 1e9
            ):
                return Insertion(None, jumped_back_s=(store.newest_ns - stamp_ns) / 1e9)
            at = bisect_left(store.stamps, stamp_ns)
            if cause is None and stamp_ns < self._floor_ns(store):
                cause = "late"
            elif cause is None and at < len(store.stamps) and store.stamps[at] == stamp_ns:
                cause = "duplicate"
            store.received += 1
            increasing = store.newest_ns is None or stamp_ns > store.newest_ns
            store.disorder = 0 if increasing else store.disorder + 1
            store.non_increasing += not increasing
            if cause is not None:
                store.dropped[cause] += 1
                return Insertion(None, cause)
            frame = Frame(camera_index, stamp_ns, image.received_ns, image)
            store.stamps.insert(at, stamp_ns)
            store.frames.insert(at, frame)
            store.recent.append(stamp_ns)
            if increasing:
                store.newest_ns = stamp_ns
            self._trim(store)
            return Insertion(frame, disorder=store.disorder)

    def newest_window(self, limit_ns: int | None = None, now_ns: int | None = None) -> FrameWindow | Refusal:
        """The newest complete window with t0 <= ``limit_ns``, newer than every one taken; changes nothing.

        Args:
            limit_ns: Latest t0 that is of use (how far the odometry reaches), or None.
            now_ns: The node's clock, to tell how long cameras have been silent.
        """
        with self._lock:
            silent = self._silent_camera(now_ns)
            first: Refusal | None = None
            for t0_ns in reversed(self._reference.stamps):
                if self._last_t0_ns is not None and t0_ns < self._last_t0_ns + self._stride_ns:
                    break
                if limit_ns is not None and t0_ns > limit_ns:
                    continue
                found = self._select(t0_ns)
                if isinstance(found, FrameWindow):
                    return found
                first = first or found
            return silent or first or Refusal("waiting", "waiting for the next frame of the reference camera")

    def take(self, window: FrameWindow) -> None:
        """Claim a window: its t0 and older ones are not offered again. Every taken window must be resolved once."""
        with self._lock:
            if self._last_t0_ns is not None and window.t0_ns <= self._last_t0_ns:
                raise ValueError(
                    f"window at {window.t0_ns} ns is not newer than the one taken at {self._last_t0_ns} ns"
                )
            self._before_last_ns, self._last_t0_ns = self._last_t0_ns, window.t0_ns
            for camera in window.cameras:
                for frame in camera.frames:
                    frame.pending += 1
                    frame.lost = "superseded"
            for store in self._stores.values():
                self._trim(store)

    def withdraw(self, window: FrameWindow) -> None:
        """Resolve the window taken last as unused and let the next one follow as if it had never been taken."""
        self.resolve(window, used=False, lost="refused")
        with self._lock:
            if self._last_t0_ns == window.t0_ns:
                self._last_t0_ns = self._before_last_ns

    def resolve(self, window: FrameWindow, used: bool, lost: DropCause = "superseded") -> None:
        """Say whether a taken window reached the engine (or why not), so that its frames can be accounted for."""
        with self._lock:
            for camera in window.cameras:
                store = self._stores[camera.index]
                for frame in camera.frames:
                    frame.pending -= 1
                    frame.used = frame.used or used
                    frame.lost = lost
                    if frame.evicted and frame.pending == 0:
                        store.orphans -= 1
                        store.settle(frame)

    def discard(self, frame: Frame, error: str) -> None:
        """Remove a frame that cannot be decoded, so that no window chooses it (again)."""
        with self._lock:
            frame.error = error
            store = self._stores[frame.camera_index]
            if not frame.evicted:
                at = store.frames.index(frame)
                store.evict(at, at + 1)

    def wanted(self, frame: Frame) -> bool:
        """Whether the next windows will probably need this frame, so that it is worth decoding ahead."""
        with self._lock:
            if self._last_t0_ns is None:
                return True
            phase = (frame.stamp_ns - self._last_t0_ns) % self._interval_ns
            return min(phase, self._interval_ns - phase) <= self._stores[frame.camera_index].half_period_ns

    def count_drop(self, camera_index: int, cause: DropCause) -> None:
        """Account for an image that was received but refused before it came here (inactive node, wrong size, ...)."""
        with self._lock:
            self._stores[camera_index].received += 1
            self._stores[camera_index].dropped[cause] += 1

    def reset(self) -> None:
        """Drop all frames (cause "reset") and forget the last t0."""
        with self._lock:
            self._last_t0_ns = self._before_last_ns = None
            for store in self._stores.values():
                store.evict(0, len(store.frames), "reset")
                store.newest_ns = None
                store.disorder = 0
                store.recent.clear()

    def accounts(self) -> dict[int, FrameAccount]:
        """Copy of the account of every camera by index."""
        with self._lock:
            return {
                index: FrameAccount(
                    store.received,
                    store.used,
                    len(store.frames) + store.orphans,
                    dict(store.dropped),
                    store.non_increasing,
                )
                for index, store in self._stores.items()
            }

    def newest_reference_ns(self) -> int | None:
        """Newest stamp of the reference camera, None before the first."""
        return self._reference.newest_ns

    def rates_hz(self) -> dict[int, float]:
        """Frame rate of every camera by index, from the stamps of its last 20 frames; 0 where unknown."""
        with self._lock:
            return {index: store.rate_hz() for index, store in self._stores.items()}

    def _floor_ns(self, store: _Store) -> int:
        """Oldest stamp that a coming window can use."""
        floor = -(1 << 62) if store.newest_ns is None else store.newest_ns - self._keep_ns
        if self._last_t0_ns is not None:
            floor = max(floor, self._last_t0_ns + self._stride_ns - self._span_ns)
        return floor

    def _trim(self, store: _Store) -> None:
        first = bisect_left(store.stamps, self._floor_ns(store))
        # A camera that sends far more than its nominal rate must not fill the memory.
        first = max(first, len(store.frames) - int(3 * store.spec.rate_hz * self._keep_ns / 1e9) - 8)
        if first:
            store.evict(0, first)

    def _select(self, t0_ns: int) -> FrameWindow | Refusal:
        cameras = []
        offset_ns = 0
        for index, store in self._stores.items():
            name = store.spec.name
            if store.newest_ns is None or store.newest_ns < t0_ns - store.half_period_ns:
                return Refusal("waiting", f"waiting for the frame of camera {name} at t0", name)
            frames: list[Frame] = []
            for k in range(self.rule.frames):
                target_ns = t0_ns - k * self._interval_ns
                frame = store.nearest(target_ns)
                off_ns = abs(frame.stamp_ns - target_ns) if frame else None
                if frame is None or off_ns is None or off_ns > self._tolerance_ns or (frames and frame is frames[-1]):
                    found = "there is no frame" if off_ns is None else f"the nearest is {off_ns / 1e6:.0f} ms off"
                    if frames and frame is frames[-1]:
                        found += " and serves another time"
                    return Refusal(
                        "missing_frame",
                        f"camera {name} needs a frame at t0 - {k * self.rule.interval_s:.1f} s within "
                        f"{self.rule.tolerance_s * 1e3:.0f} ms: {found} (t0 {t0_ns / 1e9:.3f} s)",
                        name,
                    )
                offset_ns = max(offset_ns, off_ns)
                frames.append(frame)
            cameras.append(CameraWindow(index, name, tuple(reversed(frames))))
        newest = [camera.frames[-1].stamp_ns for camera in cameras]
        return FrameWindow(t0_ns, tuple(cameras), max(newest) - min(newest), offset_ns)

    def _silent_camera(self, now_ns: int | None) -> Refusal | None:
        """The camera that has been silent for longest, where that is at least three periods."""
        stamps = [store.newest_ns for store in self._stores.values() if store.newest_ns is not None]
        if not stamps:
            return Refusal("no_frames", "no camera has sent a frame yet")
        latest_ns = max(stamps) if now_ns is None else max(max(stamps), now_ns)
        worst: tuple[float, _Store] | None = None
        for store in self._stores.values():
            if store.newest_ns is None:
                return Refusal("no_frames", f"camera {store.spec.name} has sent no frame yet", store.spec.name)
            silent_s = (latest_ns - store.newest_ns) / 1e9
            if silent_s > max(3 / store.spec.rate_hz, 0.3) and (worst is None or silent_s > worst[0]):
                worst = (silent_s, store)
        if worst is None:
            return None
        name = worst[1].spec.name
        return Refusal("silent", f"camera {name} has been silent for {worst[0]:.2f} s", name)
