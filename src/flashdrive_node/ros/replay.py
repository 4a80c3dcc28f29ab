"""One replay: node, player and recorder as processes of their own, from bring-up to the finished output bag."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lifecycle_msgs.msg import Transition

from flashdrive_node.ros.player import PlayOptions, PlayResult
from flashdrive_node.ros.session import Session, SessionError, SessionOptions, end_process
from flashdrive_node.ros.topics import NODE_NAME
from flashdrive_node.runtime.bag import open_bag, select
from flashdrive_node.runtime.rig import load_rig

_RECORDED = (f"/{NODE_NAME}/output/", f"/{NODE_NAME}/debug/", "/diagnostics")
#: How long the window that is being computed when the recording ends may take.
_LAST_WINDOW_S = 20.0
_RESULTS_TOPIC = f"/{NODE_NAME}/output/record"


@dataclass(frozen=True)
class ReplayRun:
    """What a finished replay left behind."""

    bag: Path
    #: The recorded outputs; None where the node published nothing at all.
    outputs: Path | None
    played: PlayResult
    #: Why the run ended early; "" where it did not.
    problem: str
    interrupted: bool
    log: Path


def replay(
    play: PlayOptions,
    session: SessionOptions,
    outputs: Path,
    load_timeout_s: float = 600.0,
    quiet: bool = False,
    on_text: Callable[[str], None] = print,
) -> ReplayRun:
    """Play a recording through the real node and record what it publishes.

    Args:
        play: What to play.
        session: Node parameters, folder for logs, ROS domain.
        outputs: Directory of the new bag with everything the node publishes; must not exist.
        load_timeout_s: How long the engine may take to load.
        quiet: No progress bar.
        on_text: Called with lines for the user.

    Raises:
        BagError: The recording is unreadable or does not fit the rig (checked before anything starts).
        SessionError: The node could not be brought up.
        FileExistsError: ``outputs`` exists.
    """
    if outputs.exists():
        raise FileExistsError(f"a new directory is required for the recorded outputs, {outputs} exists")
    with open_bag(play.bag) as reader:
        select(reader, load_rig(play.rig))
    problem, interrupted = "", False
    with Session(session) as running:
        recorder = running.spawn(
            "flashdrive_node.ros.recorder", [str(outputs), *(a for p in _RECORDED for a in ("--prefix", p))]
        )
        on_text(f"starting the node (log: {running.log}) ...")
        running.bring_up(load_timeout_s, lambda text: on_text(f"  engine: {text}"))
        _wait_for_recorder(running)
        player = running.spawn("flashdrive_node.ros.player", _player_arguments(play, quiet), sends_images=True)
        try:
            while player.poll() is None:
                running.spin(0.1)
            running.wait_until_idle(_LAST_WINDOW_S)
            running.transition(Transition.TRANSITION_DEACTIVATE, "deactivate", 15.0)
            running.spin(0.3)
        except KeyboardInterrupt:
            interrupted = True
            on_text("interrupted: finishing the recording ...")
        except SessionError as error:
            problem = str(error)
        played = _played(player)
        if not problem and player.returncode not in (0, 130, -signal.SIGINT):
            problem = f"the player ended with exit code {player.returncode}"
        recorded = end_process(recorder)
    return ReplayRun(play.bag, outputs if recorded == 0 else None, played, problem, interrupted, running.log)


def _wait_for_recorder(running: Session, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while running.control.count_subscribers(_RESULTS_TOPIC) == 0:
        running.spin(0.05)
        if time.monotonic() > deadline:
            raise SessionError(f"the recorder did not subscribe to {_RESULTS_TOPIC} within {timeout_s:.0f} s")


def _played(player: subprocess.Popen[str]) -> PlayResult:
    """End the player and read what it says about what it played."""
    if player.poll() is None:
        player.send_signal(signal.SIGINT)
    try:
        said, _ = player.communicate(timeout=10.0)
    except subprocess.TimeoutExpired:
        end_process(player)
        return PlayResult(interrupted=True)
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return PlayResult(**json.loads(lines[-1])) if lines else PlayResult(interrupted=True)


def _player_arguments(play: PlayOptions, quiet: bool) -> list[str]:
    arguments = [str(play.bag), "--rig", play.rig, "--rate", str(play.rate), "--start-offset", str(play.start_offset_s)]
    arguments += ["--clock-hz", str(play.clock_hz), "--wait", str(play.wait_s)]
    if play.duration_s is not None:
        arguments += ["--duration", str(play.duration_s)]
    return [*arguments, *(["--loop"] if play.loop else []), *(["--quiet"] if quiet else [])]
