"""The choice of frames against a brute-force reference, and the account of every frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdrive_node.runtime.frames import FrameWindow, Refusal
from flashdrive_node.runtime.observation import RawImage
from flashdrive_node.runtime.rig import CameraSpec, Rig
from flashdrive_node.runtime.ring_buffer import RingBuffer, WindowRule

START_NS = 1_700_000_000_000_000_000
MS = 1_000_000
INDICES = (0, 1, 2, 6)


def make_rig(rates: tuple[float, ...]) -> Rig:
    cameras = tuple(
        CameraSpec(f"camera{i}", i, f"/{i}", "compressed", rate) for i, rate in zip(INDICES, rates, strict=False)
    )
    return Rig("test", cameras, "/odometry", None)


def image(stamp_ns: int) -> RawImage:
    return RawImage(stamp_ns, stamp_ns, "jpeg", 0, 0, 0, False, b"")


def insert(ring: RingBuffer, camera: int, milliseconds: float) -> str | None:
    return ring.insert(camera, image(START_NS + round(milliseconds * MS))).dropped


def window_of(ring: RingBuffer, **kwargs: int) -> FrameWindow:
    found = ring.newest_window(**kwargs)
    assert isinstance(found, FrameWindow), found
    return found


def refusal_of(ring: RingBuffer, **kwargs: int) -> Refusal:
    found = ring.newest_window(**kwargs)
    assert isinstance(found, Refusal)
    return found


@dataclass(frozen=True)
class Arrival:
    at_ns: int
    camera: int
    stamp_ns: int


def simulate(
    rng: np.random.Generator, rig: Rig, seconds: float, skew_ms: float, jitter_ms: float, loss: float, delay_ms: float
) -> list[Arrival]:
    """Messages of free-running cameras in the order of their arrival; 3 % come twice."""
    arrivals = []
    for camera in rig.cameras:
        phase_ms = rng.uniform(0, skew_ms)
        for k in range(int(seconds * camera.rate_hz)):
            if rng.random() < loss:
                continue
            stamp = START_NS + round((k * 1e3 / camera.rate_hz + phase_ms + rng.uniform(-1, 1) * jitter_ms) * MS)
            for _ in range(2 if rng.random() < 0.03 else 1):
                arrivals.append(Arrival(stamp + round(rng.uniform(0, delay_ms) * MS), camera.index, stamp))
    return sorted(arrivals, key=lambda arrival: arrival.at_ns)


def brute_force(
    rig: Rig, stored: dict[int, list[int]], rule: WindowRule, earliest_ns: int
) -> tuple[int, dict[int, tuple[int, ...]]] | None:
    """The newest complete window by its definition, over all stamps ever accepted."""
    for t0 in sorted(stored[rig.reference.index], reverse=True):
        if t0 < earliest_ns:
            return None
        chosen: dict[int, tuple[int, ...]] = {}
        for camera in rig.cameras:
            stamps = stored[camera.index]
            targets = [t0 - k * round(rule.interval_s * 1e9) for k in reversed(range(rule.frames))]
            nearest = tuple(min(stamps, key=lambda s, t=t: (abs(s - t), s)) for t in targets) if stamps else ()
            arrived = stamps and max(stamps) >= t0 - round(0.5e9 / camera.rate_hz)
            near = all(abs(s - t) <= rule.tolerance_s * 1e9 for s, t in zip(nearest, targets, strict=False))
            if not arrived or not near or len(set(nearest)) < rule.frames:
                break
            chosen[camera.index] = nearest
        else:
            return t0, chosen
    return None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rates=st.tuples(*[st.sampled_from([10.0, 20.0, 30.0, 36.0])] * 4)
    | st.sampled_from([10.0, 20.0, 30.0, 36.0]).map(lambda rate: (rate,) * 4),
    skew_ms=st.sampled_from([0.0, 5.0, 20.0]),
    jitter_ms=st.sampled_from([0.0, 2.0, 8.0]),
    loss=st.sampled_from([0.0, 0.05, 0.3]),
    delay_ms=st.sampled_from([0.0, 15.0, 70.0]),
)
def test_windows_equal_brute_force(
    seed: int, rates: tuple[float, ...], skew_ms: float, jitter_ms: float, loss: float, delay_ms: float
) -> None:
    rig, rule, rng = make_rig(rates), WindowRule(), np.random.default_rng(seed)
    ring = RingBuffer(rig, rule)
    stored: dict[int, list[int]] = {index: [] for index in INDICES}
    stride_ns = round(0.1e9) - min(round(0.5e9 / rig.reference.rate_hz), round(0.05e9))
    last_t0, count = START_NS - 10**12, 0
    waiting: list[FrameWindow] = []
    arrivals = simulate(rng, rig, 3.0, skew_ms, jitter_ms, loss, delay_ms)
    for arrival in arrivals:
        insertion = ring.insert(arrival.camera, image(arrival.stamp_ns))
        if insertion.dropped == "duplicate":
            assert arrival.stamp_ns in stored[arrival.camera]
        elif insertion.dropped is None:
            assert arrival.stamp_ns not in stored[arrival.camera]
            stored[arrival.camera].append(arrival.stamp_ns)
        found = ring.newest_window()
        expected = brute_force(rig, stored, rule, last_t0 + stride_ns)
        if expected is not None and max(max(s, default=0) for s in stored.values()) - expected[0] > 0.2e9:
            expected = None if isinstance(found, Refusal) else expected  # beyond what is kept
        if isinstance(found, Refusal):
            assert expected is None
            continue
        assert expected == (found.t0_ns, {camera.index: camera.stamps_ns for camera in found.cameras})
        newest = [camera.stamps_ns[-1] for camera in found.cameras]
        assert found.skew_ns == max(newest) - min(newest)
        for camera in found.cameras:
            for frame in camera.frames:
                assert (frame.camera_index, frame.raw and frame.raw.stamp_ns) == (camera.index, frame.stamp_ns)
        ring.take(found)
        last_t0 = found.t0_ns
        count += 1
        waiting.append(found)
        if rng.random() < 0.7:
            ring.resolve(waiting.pop(int(rng.integers(len(waiting)))), used=bool(rng.random() < 0.8))
    assert_accounts(ring, arrivals)
    for window in waiting:
        ring.resolve(window, used=True)
    ring.reset()
    assert_accounts(ring, arrivals)
    assert all(account.held == 0 for account in ring.accounts().values())
    if loss == 0 and jitter_ms <= 2 and delay_ms == 0 and len(set(rates)) == 1:
        # 2.7 s hold 27 windows; where the rate is no multiple of 10 Hz the nearest stride is 0.111 s.
        assert count >= (22 if rates[0] == 36 else 25)


def assert_accounts(ring: RingBuffer, arrivals: list[Arrival]) -> None:
    for index, account in ring.accounts().items():
        assert account.received == sum(arrival.camera == index for arrival in arrivals)
        assert account.received == account.used + account.held + sum(account.dropped.values())


@pytest.mark.parametrize("rate", [10.0, 20.0, 30.0, 36.0])
def test_window_of_exact_cameras(rate: float) -> None:
    ring = RingBuffer(make_rig((rate,) * 4))
    for k in range(int(0.4 * rate) + 1):
        for camera in INDICES:
            assert insert(ring, camera, k * 1e3 / rate) is None
    window = window_of(ring)
    assert window.t0_ns == START_NS + round(int(0.4 * rate) * 1e3 / rate * MS)
    assert [camera.index for camera in window.cameras] == list(INDICES)
    for camera in window.cameras:
        offsets = [stamp - window.t0_ns for stamp in camera.stamps_ns]
        assert np.abs(np.array(offsets) / MS + [300, 200, 100, 0]).max() <= 1e3 / rate / 2
    assert window.skew_ns == 0


def test_each_t0_is_offered_once_and_no_earlier_than_the_period() -> None:
    ring = RingBuffer(make_rig((30.0,) * 4))
    times = []
    for k in range(60):
        for camera in INDICES:
            insert(ring, camera, k * 1e3 / 30)
        found = ring.newest_window()
        if isinstance(found, FrameWindow):
            ring.take(found)
            times.append(found.t0_ns)
            assert refusal_of(ring).reason == "waiting"
    assert np.allclose(np.diff(times) / MS, 100, atol=0.01)
    with pytest.raises(ValueError, match="is not newer than the one taken"):
        ring.take(found if isinstance(found, FrameWindow) else FrameWindow(times[0], (), 0, 0))


def test_limit_chooses_an_older_window() -> None:
    ring = RingBuffer(make_rig((10.0,) * 4))
    for k in range(6):
        for camera in INDICES:
            insert(ring, camera, 100 * k)
    assert window_of(ring).t0_ns == START_NS + 500 * MS
    assert window_of(ring, limit_ns=START_NS + 450 * MS).t0_ns == START_NS + 400 * MS
    assert isinstance(ring.newest_window(limit_ns=START_NS), Refusal)


def test_waits_for_the_nearer_frame() -> None:
    """At 36 Hz the frame 25 ms before t0 is within the tolerance, but the next one will be nearer."""
    ring = RingBuffer(make_rig((36.0, 36.0)))
    period = 1e3 / 36
    for k in range(16):
        insert(ring, 1, k * period)
        insert(ring, 0, k * period + 2)
    ring.take(window_of(ring))
    for k in (16, 17, 18, 19):
        insert(ring, 1, k * period)
        if k < 19:
            insert(ring, 0, k * period + 2)
    assert refusal_of(ring).reason == "waiting"
    insert(ring, 0, 19 * period + 2)
    assert window_of(ring).cameras[0].stamps_ns[-1] == START_NS + round((19 * period + 2) * MS)


def test_refusals_name_the_camera_and_the_distance() -> None:
    ring = RingBuffer(make_rig((10.0,) * 4))
    assert refusal_of(ring).text == "no camera has sent a frame yet"
    for k in range(5):
        for camera in INDICES:
            if (camera, k) != (2, 2):
                insert(ring, camera, 100 * k)
    missing = refusal_of(ring)
    assert (missing.reason, missing.camera) == ("missing_frame", "camera2")
    assert "t0 - 0.2 s within 50 ms: the nearest is 100 ms off" in missing.text
    for k in range(5, 12):
        for camera in (0, 1, 2):
            insert(ring, camera, 100 * k)
    silent = refusal_of(ring)
    assert (silent.reason, silent.camera) == ("silent", "camera6")
    assert "0.70 s" in silent.text
    assert "1.70 s" in refusal_of(ring, now_ns=START_NS + 2100 * MS).text


def test_no_frame_serves_two_times() -> None:
    ring = RingBuffer(make_rig((10.0,)))
    for at in (0, 100, 150, 300):
        insert(ring, 0, at)
    # 150 ms is 50 ms from both 200 and 100; 100 has its own frame, so each serves once.
    assert [(s - START_NS) // MS for s in window_of(ring).cameras[0].stamps_ns] == [0, 100, 150, 300]
    ring = RingBuffer(make_rig((10.0,)))
    for at in (0, 150, 300):
        insert(ring, 0, at)
    assert "serves another time" in refusal_of(ring).text


def test_stamps_that_are_not_accepted() -> None:
    ring = RingBuffer(make_rig((10.0,)))
    for at in range(0, 2000, 100):
        assert insert(ring, 0, at) is None
    assert insert(ring, 0, 1900) == "duplicate"
    assert insert(ring, 0, 1000) == "late"
    jump = ring.insert(0, image(START_NS + 800 * MS))
    assert jump.frame is None
    assert jump.jumped_back_s == pytest.approx(1.1)
    now_ns = START_NS + 2000 * MS
    assert ring.insert(0, image(now_ns + 10**10), now_ns).dropped == "future"
    assert ring.insert(0, image(0), now_ns).dropped == "stale"
    account = ring.accounts()[0]
    assert account.received == 24
    assert account.dropped == {"duplicate": 1, "late": 1, "future": 1, "stale": 1, "not_needed": 13}


def test_corrupt_frames_are_not_chosen() -> None:
    ring = RingBuffer(make_rig((30.0,)))
    frames = [ring.insert(0, image(START_NS + round(k * 1e3 / 30 * MS))).frame for k in range(13)]
    chosen = window_of(ring).cameras[0].frames[1]
    ring.discard(chosen, "broken")
    again = window_of(ring).cameras[0].frames
    assert chosen not in again
    assert again[1] in frames
    assert ring.accounts()[0].dropped == {"corrupt": 1}


def test_withdrawn_window_does_not_hold_up_the_next() -> None:
    ring = RingBuffer(make_rig((30.0,)))
    for k in range(12):
        insert(ring, 0, k * 1e3 / 30)
    window = window_of(ring)
    ring.take(window)
    insert(ring, 0, 12 * 1e3 / 30)
    assert isinstance(ring.newest_window(), Refusal)
    ring.discard(window.cameras[0].frames[-1], "broken")
    ring.withdraw(window)
    assert window_of(ring).t0_ns == START_NS + 400 * MS
    account = ring.accounts()[0]
    assert account.received == 13 == account.used + account.held + sum(account.dropped.values())
    assert account.dropped["corrupt"] == 1


def test_memory_is_bounded_whatever_comes() -> None:
    ring = RingBuffer(make_rig((10.0,)))
    for k in range(3000):
        insert(ring, 0, k * 0.1)
    assert ring.accounts()[0].held <= 30


def test_decode_ahead_skips_frames_between_windows() -> None:
    ring = RingBuffer(make_rig((30.0,)))
    wanted = []
    for k in range(90):
        frame = ring.insert(0, image(START_NS + round(k * 1e3 / 30 * MS))).frame
        assert frame is not None
        wanted.append(ring.wanted(frame))
        found = ring.newest_window()
        if isinstance(found, FrameWindow):
            assert k < 12 or all(wanted[(f.stamp_ns - START_NS + MS) * 30 // 10**9] for f in found.cameras[0].frames)
            ring.take(found)
            ring.resolve(found, used=True)
    assert sum(wanted[30:]) == 20


def test_rules_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most half of interval_s \(0.05 s\), found 0.06"):
        RingBuffer(make_rig((10.0,)), WindowRule(tolerance_s=0.06))
    with pytest.raises(ValueError, match=r"'camera0': frames 0.1 s apart need 10 Hz, it has 5 Hz"):
        RingBuffer(make_rig((5.0,)))
