"""Scenes driven one after the other through the driving node, with the scores of the in-process run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rclpy.node import Node

from flashdrive_node.evaluation.closed_loop import ClosedLoop
from flashdrive_node.evaluation.closed_loop_run import RunSettings, SceneRow, expert_scores, scene_rows
from flashdrive_node.evaluation.drive_report import DriveReport, as_json, markdown
from flashdrive_node.evaluation.drive_video import DriveVideo
from flashdrive_node.evaluation.metrics import Percentiles
from flashdrive_node.evaluation.picture_files import FORMATS
from flashdrive_node.evaluation.world_views import world_cameras
from flashdrive_node.model.errors import InputError
from flashdrive_node.ros.driver_link import DriverError, DriverLink
from flashdrive_node.ros.scene_drive import DT_NS, DriveMode, SceneDrive, WindowLog
from flashdrive_node.ros.world_clock import WorldClock
from flashdrive_node.ros.world_sensors import WorldSensors, wait_until_heard
from flashdrive_node.runtime.rig import Rig, RigError, load_rig
from flashdrive_node.world.decision_text import parse
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.frames import FrameSettings
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import move

#: Who drives, in reports.
POLICY = "node"
#: File with the scores so far, and its table for people.
RESULT, TABLE = "closed_loop.json", "closed_loop.md"
_NOTE = "The driving node drives this vehicle of the procedural world through ROS 2."
#: Time of the first scene's first state, and from the end of a scene to the start of the next.
_START_NS, _PAUSE_NS = 1_000_000_000_000, 500_000_000


@dataclass(frozen=True)
class WorldOptions:
    """What is driven, and through which node."""

    #: Folder for the results; made where it is missing.
    out: Path
    run: RunSettings = field(default_factory=RunSettings)
    #: Indices of the scenes in their split.
    indices: tuple[int, ...] = (0,)
    mode: DriveMode = field(default_factory=DriveMode)
    rig: str = "sample"
    #: Full name of the driving node.
    driver: str = "/flashdrive_node"
    #: Width and height of pictures where the rig leaves them open.
    size: tuple[int, int] = (288, 160)
    #: "jpeg" or "png" for cameras with compressed transport.
    file_format: str = "jpeg"
    #: Torch device of the world.
    device: str = "cpu"
    ready_timeout_s: float = 900.0
    #: Without diagnostics for so long the driving node counts as gone.
    silence_s: float = 10.0
    #: So many scenes from the first on become videos.
    videos: int = 0
    #: No progress bars.
    quiet: bool = False

    def __post_init__(self) -> None:
        """Check everything that can be checked without the rig.

        Raises:
            InputError: Values that make no sense; says what was required and found.
        """
        if not self.indices or min(self.indices) < 0:
            raise InputError(f"scenes: at least one, with indices from 0 on, is required, found {list(self.indices)}")
        if self.file_format not in FORMATS:
            raise InputError(f"pictures: one of {', '.join(FORMATS)} is required, found {self.file_format!r}")
        if self.videos < 0:
            raise InputError(f"videos: at least 0 is required, found {self.videos}")
        for name, value in (
            ("answer timeout", self.mode.answer_timeout_s),
            ("ready timeout", self.ready_timeout_s),
            ("silence", self.silence_s),
        ):
            if not value > 0:
                raise InputError(f"{name}: more than 0 s is required, found {value}")


@dataclass
class WorldResult:
    """What came of a run; written after every scene."""

    options: WorldOptions
    rows: list[SceneRow] = field(default_factory=list)
    logs: list[WindowLog] = field(default_factory=list)
    #: Why it ended early; "" where it did not.
    problem: str = ""
    interrupted: bool = False

    def report(self) -> DriveReport:
        """The scores, as those of a run in process."""
        o = self.options
        conditions = {
            "through": f"ROS 2, {o.driver}, {'real time' if o.mode.real_time else 'lock-step'}",
            "device": o.device,
            "size": "x".join(map(str, o.size)),
            "pictures": o.file_format,
        }
        return DriveReport(o.run, {POLICY: self.rows}, conditions)

    def windows(self) -> dict[str, Any]:
        """What came of all windows."""
        unanswered: dict[str, int] = {}
        for log in self.logs:
            for reason, count in log.unanswered.items():
                unanswered[reason] = unanswered.get(reason, 0) + count
        ages, totals = ([v for log in self.logs for v in getattr(log, name)] for name in ("age_ms", "total_ms"))
        return {
            "answered": sum(log.answered for log in self.logs),
            "unanswered": unanswered,
            "other_inputs": sum(log.other_inputs for log in self.logs),
            "age_ms": dataclasses.asdict(Percentiles.of(ages)) if ages else None,
            "node_ms": dataclasses.asdict(Percentiles.of(totals)) if totals else None,
            "world_late_s": round(sum(log.late_s for log in self.logs), 3),
        }

    def lines(self) -> list[str]:
        """Tables for people."""
        windows = self.windows()
        lines = [markdown(self.report()), ""] if self.rows else []
        missing = sum(windows["unanswered"].values())
        lines.append(f"windows with a trajectory {windows['answered']}, without {missing}")
        lines += [f"  {count} x {reason}" for reason, count in windows["unanswered"].items()]
        for name, title in (("age_ms", "age of the trajectory when driven"), ("node_ms", "image to trajectory")):
            if (p := windows[name]) is not None:
                lines.append(f"{title}: p50 {p['p50']:.0f} ms, p99 {p['p99']:.0f} ms")
        if windows["other_inputs"]:
            lines.append(f"answers to other pictures or navigation texts than those sent: {windows['other_inputs']}")
        if windows["world_late_s"]:
            lines.append(f"time was stretched by {windows['world_late_s']:.1f} s because the world itself was late")
        return lines

    def write(self) -> None:
        """Write `RESULT` and `TABLE`."""
        content = as_json(self.report()) if self.rows else {}
        content["windows"] = self.windows()
        content["problem"], content["interrupted"] = self.problem, self.interrupted
        (self.options.out / RESULT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self.options.out / TABLE).write_text("\n".join(self.lines()) + "\n", encoding="utf-8")


class World:
    """The world's side of ROS: sensors, clock and the link to the driving node."""

    def __init__(self, node: Node, options: WorldOptions):
        """Advertise everything.

        Raises:
            RigError, InputError: The rig is wrong, or has cameras or sizes that the world cannot give.
        """
        rig = load_rig(options.rig)
        self.frames = frame_settings(rig, options.size)
        self.options = options
        self.sensors = WorldSensors(node, rig, options.file_format)
        self.clock = WorldClock(node)
        self.link = DriverLink(node, options.driver, options.silence_s)
        self._begin_ns = _START_NS

    def close(self) -> None:
        """Stop time and listening."""
        self.clock.close()
        self.link.close()

    def wait_for_driver(self) -> None:
        """Let time stand until the driving node hears everything and is ready.

        Raises:
            DriverError: It does not come to that.
        """

        def stand() -> None:
            self.clock.tell(_START_NS)

        self.link.wait_until_ready(self.options.ready_timeout_s, stand)
        missing = wait_until_heard(self.sensors, 10.0, stand)
        if missing:
            raise DriverError(f"{self.options.driver} must subscribe to every input, nobody does to {missing}")

    def scene_drive(self, loop: ClosedLoop) -> SceneDrive:
        """The drive of a loop with one scene and this world's `frames`, from where time stands now."""
        return SceneDrive(loop, self.link, self.sensors, self.clock, self._begin_ns, self.options.mode)

    def drive(self, index: int, on_step: Callable[[], object], video: Path | None) -> tuple[SceneRow, WindowLog]:
        """Drive one scene.

        Args:
            index: Of the scene in its split.
            on_step: Called after every step.
            video: MP4 to write of it.

        Raises:
            DriverError: The driving node has gone, or says nothing any more.
        """
        settings = self.options.run
        scene = move(sample_scenes(scene_keys(settings.split, [index])), self.options.device)
        expert = expert_scores(scene, settings.steps)
        loop = ClosedLoop(scene, self.frames)
        drive = self.scene_drive(loop)
        drive.start()
        film = DriveVideo(scene, _NOTE) if video is not None else None
        for _ in range(settings.steps):
            drive.step()
            on_step()
            if film is not None:
                said = drive.record.get("reasoning", "")
                film.add(loop.states[-2], loop.trajectory, drive.pictures, said, _figures(drive))
        if film is not None and video is not None:
            film.write(video, self.options.quiet)
        self._begin_ns = drive.now_ns + _PAUSE_NS
        log = drive.log
        malformed = sum(parse(text) is None for text in log.texts)
        share = log.following / settings.steps
        (row,) = scene_rows([index], loop, expert, [share], [len(log.texts)], [malformed])
        return row, log


def _figures(drive: SceneDrive) -> list[tuple[str, str]]:
    """Of the window that is driven by, for the video."""
    record = drive.record
    if not record:
        return [("window", "none yet")]
    age_s = (drive.now_ns - DT_NS - record["t0_ns"]) / 1e9
    return [
        ("window", f"{record['window_id']}, {age_s:.1f} s old"),
        ("engine", f"{record['timings_ms']['engine']:.0f} ms"),
    ]


def frame_settings(rig: Rig, size: tuple[int, int]) -> FrameSettings:
    """How the pictures of a rig's cameras are drawn: in the rig's size, or the given one where the rig leaves it open.

    Raises:
        RigError: The rig wants several sizes, or a camera that the world has not.
        InputError: The world cannot draw pictures of this size.
    """
    sizes = {(c.width or size[0], c.height or size[1]) for c in rig.cameras}
    if len(sizes) > 1:
        raise RigError(rig.name, [f"the world draws all pictures in one size, the cameras have {sorted(sizes)}"])
    ((width, height),) = sizes
    if width < 8 or width % 8 or height < 8:
        raise InputError(
            f"pictures need a width that is a multiple of 8 and sides of 8 or more, found {width} x {height}"
        )
    return FrameSettings(cameras=tuple(world_cameras(rig).values()), width=width, height=height, chunk=1)


def drive_scenes(world: World, on_step: Callable[[], object]) -> WorldResult:
    """Drive all scenes; what was driven until an end before time is kept and written.

    Args:
        world: Whose driving node may still be loading.
        on_step: Called after every step.
    """
    result = WorldResult(world.options)
    world.options.out.mkdir(parents=True, exist_ok=True)
    try:
        world.wait_for_driver()
        options = world.options
        for number, index in enumerate(options.indices):
            video = options.out / f"scene_{index:05d}.mp4" if number < options.videos else None
            row, log = world.drive(index, on_step, video)
            result.rows.append(row)
            result.logs.append(log)
            result.write()
    except DriverError as error:
        result.problem = str(error)
    except KeyboardInterrupt:
        result.interrupted = True
    result.write()
    return result
