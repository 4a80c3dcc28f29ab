"""Windows and truth of recordings: what the node would form, what was driven, and nothing of later in a window."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashdrive_node.evaluation.bag_clips import BagClips
from flashdrive_node.evaluation.clip import ClipError, Window, parse_range
from flashdrive_node.model.errors import InputError
from support.driven_bag import RIG, SPEED, START_NS, TURN, circle, shade, write_bag


def read(*bags: Path, windows: int = 120) -> dict[str, list[Window]]:
    return {clip.name: list(clip.windows) for clip in BagClips(bags, RIG, windows).clips()}


def seconds(window: Window) -> float:
    return round((window.observation.t0_ns - START_NS) / 1e9, 6)


def test_windows_and_what_was_driven(tmp_path: Path) -> None:
    clips = read(write_bag(tmp_path / "drive", 9.0))
    assert list(clips) == ["drive-0000"]
    windows = clips["drive-0000"]
    # A history of 1.5 s in front of the first, 6.4 s of future behind the last.
    assert [seconds(w) for w in windows] == [round(1.5 + 0.1 * k, 1) for k in range(12)]
    for window in windows:
        t0 = seconds(window)
        for camera in window.observation.cameras:
            assert [int(picture[0, 0, 0]) for picture in camera.images] == [shade(t0 - 0.3 + 0.1 * k) for k in range(4)]
        # The circle seen from the vehicle: the same from everywhere on it.
        turned = TURN * 0.1 * np.arange(1, 65)
        radius = SPEED / TURN
        circled = np.stack([radius * np.sin(turned), radius * (1 - np.cos(turned)), np.zeros(64)], axis=1)
        assert window.truth is not None
        np.testing.assert_allclose(window.truth.xyz, circled, atol=1e-3)
        np.testing.assert_allclose(window.truth.yaw, turned, atol=1e-5)
        np.testing.assert_allclose(window.observation.ego_history_xyz[-2], [-0.8, 0.0, 0.0], atol=0.01)
        assert window.observation.nav_text == "Turn left in 40m"


def test_nothing_of_later_is_in_a_window(tmp_path: Path) -> None:
    def swerve(time_s: float) -> tuple[float, float, float]:
        x, y, yaw = circle(time_s)
        return (x, y, yaw) if time_s <= 2.0 else (x, y + (time_s - 2.0) ** 2, yaw + 0.2 * (time_s - 2.0))

    one = read(write_bag(tmp_path / "one", 9.0))["one-0000"]
    other = read(
        write_bag(tmp_path / "two", 9.0, motion=swerve, shade=lambda t: shade(t) if t <= 2.0 else 255 - shade(t))
    )["two-0000"]
    same = [pair for pair in zip(one, other, strict=True) if seconds(pair[0]) <= 2.0]
    assert len(same) == 6
    for a, b in same:
        assert a.observation.t0_ns == b.observation.t0_ns
        for x, y in zip(a.observation.cameras, b.observation.cameras, strict=True):
            assert x.stamps_ns == y.stamps_ns
            assert max(x.stamps_ns) <= a.observation.t0_ns
            assert all(np.array_equal(p, q) for p, q in zip(x.images, y.images, strict=True))
        assert a.observation.ego_history_xyz.tobytes() == b.observation.ego_history_xyz.tobytes()
        assert a.observation.ego_history_rot.tobytes() == b.observation.ego_history_rot.tobytes()
        assert a.truth is not None
        assert b.truth is not None
        assert np.abs(a.truth.xyz - b.truth.xyz).max() > 5.0


def test_clips_have_a_length_and_end_at_gaps(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", 14.0, missing=(4.0, 5.5))
    clips = read(bag, windows=20)
    assert {name: len(windows) for name, windows in clips.items()} == {
        "drive-0000": 20,
        "drive-0001": 6,
        "drive-0002": 19,
    }
    assert seconds(clips["drive-0002"][0]) == 5.8
    # Clips that are passed over are the same afterwards.
    source = BagClips([bag], RIG, 20)
    last = list(source.clips())[-1]
    assert last.name == "drive-0002"
    third = [list(clip.windows) for clip in source.clips() if clip.name == "drive-0002"]
    assert [seconds(w) for w in third[0]] == [seconds(w) for w in clips["drive-0002"]]


def test_holes_in_the_odometry_leave_windows_without_truth(tmp_path: Path) -> None:
    windows, after = read(write_bag(tmp_path / "drive", 18.0, no_odometry=(9.0, 9.6))).values()
    without = [seconds(w) for w in windows if w.truth is None]
    # All whose 6.4 s pass over the hole; those whose history does are not formed.
    assert without[0] == pytest.approx(2.7)
    assert without[-1] <= 9.0
    assert [seconds(w) for w in after] == [11.1, 11.2, 11.3, 11.4, 11.5, 11.6]
    assert all(w.truth is not None for w in after)


def test_broken_pictures_are_noted(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", 9.0, cut_picture_at=2.0)
    clip = next(BagClips([bag], RIG).clips())
    windows = list(clip.windows)
    assert [t for t in (2.0, 2.1, 2.2, 2.3) if t in [seconds(w) for w in windows]] == []
    assert len(clip.notes) == 4
    assert "data of 36 rows must be" in clip.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 5.0}, "odometry must reach 6.4 s beyond a window"),
        ({"seconds": 9.0, "odometry_seconds": 5.0}, "odometry must reach 6.4 s beyond a window"),
        ({"seconds": 0.0}, "no window can be scored: camera c0 needs a frame"),
        ({"seconds": 20.0, "missing": (-1.0, 21.0)}, "does not fit the rig"),
    ],
)
def test_recordings_without_a_window_say_why(tmp_path: Path, options: dict, message: str) -> None:
    bag = write_bag(tmp_path / "bad", **options)
    good = write_bag(tmp_path / "good", 8.0)
    clips = BagClips([bag, good], RIG).clips()
    with pytest.raises(ClipError, match=message):
        list(next(clips).windows)
    assert len(list(next(clips).windows)) == 2
    assert next(clips, None) is None


def test_unknown_topics_and_missing_bags(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", 8.0)
    clip = next(BagClips([bag], replace(RIG, odometry_topic="/elsewhere")).clips())
    with pytest.raises(ClipError, match=r"/elsewhere .* is required, found no such topic"):
        list(clip.windows)
    with pytest.raises(ClipError, match="found nothing there"):
        list(next(BagClips([tmp_path / "nowhere"], RIG).clips()).windows)
    with pytest.raises(InputError, match="bags of different names"):
        BagClips([bag, tmp_path / "elsewhere" / "drive"], RIG)


def test_headings_do_not_wrap(tmp_path: Path) -> None:
    # Heading passes from pi to -pi within the future.
    bag = write_bag(tmp_path / "drive", 9.0, motion=lambda t: (*circle(t + 28.0)[:2], circle(t + 28.0)[2]))
    truth = read(bag)["drive-0000"][0].truth
    assert truth is not None
    assert truth.yaw[-1] == pytest.approx(6.4 * TURN, abs=1e-4)
    assert abs(math.remainder(TURN * (28.0 + 9.0), math.tau)) > 2.5


def test_ranges() -> None:
    assert parse_range("0-3", "--world") == range(4)
    assert parse_range("7", "--world") == range(7, 8)
    for text in ("", "3-1", "-2", "a-b", "1-"):
        with pytest.raises(InputError, match="--world: indices such as 17 or 0-199 are required"):
            parse_range(text, "--world")
