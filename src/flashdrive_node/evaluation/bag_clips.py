"""Clips from rosbag2 recordings: the windows that the node would form, and the bag's own later odometry as truth.

Messages go through the node's own frame choice and ego history in the order of the recording, so a window holds what
the node had at that moment and nothing of later. The odometry is read once more, beforehand, for the truth alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from flashdrive_node.evaluation.clip import FUTURE_DT_S, FUTURE_POINTS, PROTOCOL_WINDOWS, Clip, ClipError, Truth, Window
from flashdrive_node.evaluation.driven_route import DrivenRoute
from flashdrive_node.model.errors import InputError
from flashdrive_node.runtime.assembly import build_observation
from flashdrive_node.runtime.bag import (
    BagError,
    messages,
    odometry_sample,
    open_bag,
    raw_image,
    select,
)
from flashdrive_node.runtime.decode import DecodeError, decode_image
from flashdrive_node.runtime.ego_history import EgoHistory, EgoWindow
from flashdrive_node.runtime.frames import FrameWindow, Refusal
from flashdrive_node.runtime.observation import OdometrySample
from flashdrive_node.runtime.pipeline_settings import PipelineSettings
from flashdrive_node.runtime.rig import Rig
from flashdrive_node.runtime.ring_buffer import RingBuffer

_FUTURE_NS = round(FUTURE_POINTS * FUTURE_DT_S * 1e9)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A window whose pictures are not decoded yet."""

    clip: int
    frames: FrameWindow
    ego: EgoWindow
    nav_text: str | None
    truth: Truth | None


class BagClips:
    """Recordings of one rig, cut into clips of consecutive windows; a gap in the windows begins a new clip."""

    def __init__(
        self,
        bags: Sequence[Path],
        rig: Rig,
        windows: int = PROTOCOL_WINDOWS,
        settings: PipelineSettings | None = None,
    ):
        """Keep what is needed to read.

        Args:
            bags: rosbag2 directories or files.
            rig: Topics and cameras.
            windows: Of a clip at most.
            settings: Rules of frame choice and ego history.

        Raises:
            InputError: Clips without windows, no bag, or two bags of one name.
        """
        names = [bag.stem for bag in bags]
        if windows < 1 or not bags or len(set(names)) < len(names):
            raise InputError(f"bags of different names and clips of 1 window or more are required, found {names}")
        self.name = f"bags {', '.join(names)}"
        self.bags, self.rig, self.windows = list(bags), rig, windows
        self.camera_indices = tuple(camera.index for camera in rig.cameras)
        self.settings = settings or PipelineSettings()

    def __len__(self) -> int:
        return 0

    def clips(self) -> Iterator[Clip]:
        """Clips of all bags; one that cannot be read is a clip that says why when its windows are taken."""
        for bag in self.bags:
            number = -1
            try:
                for number, candidates in groupby(self._candidates(bag), key=lambda c: c.clip):
                    clip = Clip(f"{bag.stem}-{number:04d}", iter(()))
                    clip.windows = self._decoded(candidates, clip.notes)
                    yield clip
            except BagError as error:
                yield Clip(f"{bag.stem}-{number + 1:04d}", _failing(error))

    def _candidates(self, bag: Path) -> Iterator[_Candidate]:
        route = read_route(bag, self.rig, self.settings.ego.max_gap_s)
        formed = clip = inside = 0
        before_ns: int | None = None
        refusal: Refusal | None = None
        for found, nav_text in self._formed(bag):
            if isinstance(found, Refusal):
                refusal = found
                continue
            window, ego = found
            formed += 1
            if window.t0_ns + _FUTURE_NS > route.end_ns:
                break
            gap = before_ns is not None and window.t0_ns - before_ns > self.settings.max_t0_gap_s * 1e9
            if inside == self.windows or gap:
                clip, inside = clip + 1, 0
            before_ns, inside = window.t0_ns, inside + 1
            yield _Candidate(clip, window, ego, nav_text, route.future(window.t0_ns))
        if not inside:
            future_s = FUTURE_POINTS * FUTURE_DT_S
            why = f"odometry must reach {future_s} s beyond a window, found none that long before its end"
            raise BagError(f"{bag}: no window can be scored: {why if formed else refusal.text if refusal else 'none'}")

    def _formed(self, bag: Path) -> Iterator[tuple[tuple[FrameWindow, EgoWindow] | Refusal, str | None]]:
        """Windows as they become complete, and between them why there is none; with the navigation text then."""
        rig, rules = self.rig, self.settings
        ring, history = RingBuffer(rig, rules.window), EgoHistory(rules.ego, rig.base_frame)
        cameras = {camera.topic: camera.index for camera in rig.cameras}
        nav_text: str | None = None
        with open_bag(bag) as reader:
            connections = [c for c in select(reader, rig) if not c.msgtype.endswith("CameraInfo")]
            for connection, _, raw in messages(reader, connections):
                message = reader.deserialize(raw, connection.msgtype)
                if connection.topic == rig.navigation_topic:
                    nav_text = message.data.strip() or None  # type: ignore[attr-defined]
                    continue
                if connection.topic == rig.odometry_topic:
                    refused = history.insert(odometry_sample(message))
                    jumped = refused is not None and refused.reason == "clock_jump"
                else:
                    image = raw_image(message, connection.msgtype)
                    jumped = ring.insert(cameras[connection.topic], image).jumped_back_s is not None
                if jumped:
                    raise BagError(f"{bag}: its stamps go back: recordings that were played in a loop have no future")
                yield self._newest(ring, history), nav_text

    @staticmethod
    def _newest(ring: RingBuffer, history: EgoHistory) -> tuple[FrameWindow, EgoWindow] | Refusal:
        limit_ns = history.newest_usable_ns()
        if limit_ns is None:
            return Refusal("odometry_missing", "no odometry")
        window = ring.newest_window(limit_ns)
        if isinstance(window, Refusal):
            return window
        ego = history.history_at(window.t0_ns)
        if isinstance(ego, Refusal):
            return ego
        ring.take(window)
        ring.resolve(window, used=True)
        return window, ego

    def _decoded(self, candidates: Iterator[_Candidate], notes: list[str]) -> Iterator[Window]:
        try:
            for number, candidate in enumerate(candidates):
                try:
                    self._decode(candidate.frames)
                except DecodeError as error:
                    notes.append(f"window {number} left out: {error}")
                    continue
                observation = build_observation(number, candidate.frames, candidate.ego, candidate.nav_text)
                yield Window(observation, candidate.truth)
        except BagError as error:
            raise ClipError(str(error)) from error

    def _decode(self, window: FrameWindow) -> None:
        for frame in window.frames:
            if frame.pixels is None:
                assert frame.raw is not None
                camera = self.rig.camera(frame.camera_index)
                frame.pixels = decode_image(frame.raw, self.settings.max_pixels, camera.width, camera.height)
                frame.raw = None


def read_route(bag: Path, rig: Rig, max_gap_s: float) -> DrivenRoute:
    """All odometry of a bag.

    Raises:
        BagError: The bag cannot be read, does not fit the rig, or holds no usable odometry.
    """
    samples: list[OdometrySample] = []
    with open_bag(bag) as reader:
        connections = [c for c in select(reader, rig) if c.topic == rig.odometry_topic]
        for connection, _, raw in messages(reader, connections):
            samples.append(odometry_sample(reader.deserialize(raw, connection.msgtype)))
    return DrivenRoute(samples, max_gap_s)


def _failing(error: BagError) -> Iterator[Window]:
    raise ClipError(str(error)) from error
    yield  # a generator, so that the error comes when windows are taken
