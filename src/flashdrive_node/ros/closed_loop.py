"""Drives in the world through the real node: driving node and world as processes of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flashdrive_node.ros.session import Session, SessionError, SessionOptions, end_process
from flashdrive_node.ros.world_node import arguments
from flashdrive_node.ros.world_run import WorldOptions, frame_settings
from flashdrive_node.runtime.rig import Rig, load_rig

#: The world waits for what the node says about every window, so the node says it often.
_DIAGNOSTICS_PERIOD_S = 0.1


@dataclass(frozen=True)
class ClosedLoopRun:
    """What a finished run left behind, beside the files of the world."""

    #: Exit code of the world: 0 all scenes driven, 1 the driving node failed, 2 bad input, 130 interrupted.
    code: int
    #: Tables for people.
    tables: str
    #: Why the driving node ended; "" where it did not.
    problem: str
    log: Path


def drive_through_node(
    options: WorldOptions,
    parameters: Mapping[str, object],
    params_file: Path | None = None,
    load_timeout_s: float = 900.0,
    on_text: Callable[[str], None] = print,
) -> ClosedLoopRun:
    """Start the driving node and the world, and let the world drive its scenes.

    Args:
        options: Of the world; its results and the node's log go to ``options.out``.
        parameters: Of the driving node by ROS name, over those of the file.
        params_file: Of the driving node.
        load_timeout_s: How long the engine may take to load.
        on_text: Called with lines for the user.

    Raises:
        RigError, InputError: The rig or the size of the pictures cannot be used.
        SessionError: The driving node could not be brought up.
    """
    rig = load_rig(options.rig)
    frame_settings(rig, options.size)
    own: dict[str, object] = {"diagnostics_period_s": _DIAGNOSTICS_PERIOD_S}
    if not options.mode.real_time:
        own |= reliable_inputs(rig)
    options.out.mkdir(parents=True, exist_ok=True)
    session = SessionOptions(
        rig=options.rig, folder=options.out, params_file=params_file, parameters={**own, **parameters}
    )
    problem = ""
    with Session(session) as running:
        on_text(f"starting the node (log: {running.log}) ...")
        try:
            running.bring_up(load_timeout_s, lambda text: on_text(f"  engine: {text}"))
        except KeyboardInterrupt:
            return ClosedLoopRun(130, "", "", running.log)
        world = running.spawn("flashdrive_node.ros.world_node", arguments(options), sends_images=True)
        try:
            while world.poll() is None:
                running.spin(0.1)
        except KeyboardInterrupt:
            on_text("interrupted: writing the scores ...")
        except SessionError as error:
            problem = str(error)
        tables, code = _end(world)
    return ClosedLoopRun(code, tables, problem, running.log)


def reliable_inputs(rig: Rig) -> dict[str, object]:
    """Parameters for reliable subscriptions to cameras and odometry: in lock-step nothing may be lost."""
    topics = [rig.odometry_topic, *(camera.topic for camera in rig.cameras)]
    return {f"qos_overrides.{topic}.subscription.reliability": "reliable" for topic in topics}


def _end(world: subprocess.Popen[str]) -> tuple[str, int]:
    """End the world where it still runs; its tables and its exit code."""
    if world.poll() is None:
        world.terminate()
    try:
        tables, _ = world.communicate(timeout=20.0)
    except subprocess.TimeoutExpired:
        return "", end_process(world)
    return tables, world.returncode
