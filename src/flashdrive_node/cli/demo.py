"""``flashdrive demo``: the bundled drive through the real node over DDS, with a video, a rosbag and a report."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flashdrive_node.bundled import BUNDLED, bundled_checkpoint, bundled_drafter, bundled_drive, bundled_overlay

if TYPE_CHECKING:
    from flashdrive_node.evaluation.replay_report import ReplayReport

_RIG = "sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results (default: out/demo)")
    parser.add_argument("--bag", type=Path, help="play this recording of the rig 'sample' in place of the bundled one")
    parser.add_argument("--checkpoint", default=BUNDLED, help="run this checkpoint in place of the bundled one")
    parser.add_argument("--seconds", type=float, help="play only the beginning of the drive")
    parser.add_argument("--rate", type=float, default=1.0, help="seconds of the drive per second (default: 1)")
    parser.add_argument("--device", default="cpu", help="PyTorch device of the node (default: cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 0; 1 where the node published nothing; 2 where something could not be started."""
    from tqdm import tqdm

    from flashdrive_node.evaluation.replay_report import read_outputs
    from flashdrive_node.evaluation.video import RATE_HZ, read_drive, write_video
    from flashdrive_node.ros.session import SessionError
    from flashdrive_node.runtime.bag import BagError
    from flashdrive_node.runtime.rig import load_rig

    started = time.monotonic()
    out, bag = args.out, args.bag or bundled_drive()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "outputs", ignore_errors=True)
    try:
        print("1/3  replaying a drive of the procedural world through the node, on this machine ...", flush=True)
        report = _replay(args, bag)
        print("2/3  what came of it:", flush=True)
        summary = _write_report(report, out)
        if not report.published:
            return 1
        print("3/3  drawing the video ...", flush=True)
        drive = read_drive(bag, load_rig(_RIG), read_outputs(out / "outputs").records, _note(report), args.seconds)
        pictures = int((drive.end_ns - drive.start_ns) / 1e9 * RATE_HZ) + 1
        with tqdm(total=pictures, unit="picture", desc="video", disable=args.quiet) as bar:
            write_video(out / "demo.mp4", bag, drive, lambda done: bar.update(done - bar.n))
    except (BagError, SessionError) as error:
        print(f"flashdrive demo: {error}", file=sys.stderr)
        return 2
    print(_where_to_look(out, bag, summary, time.monotonic() - started))
    return 0


def _replay(args: argparse.Namespace, bag: Path) -> ReplayReport:
    """Play the drive through the node; both run as processes of their own."""
    from flashdrive_node.evaluation.replay_report import make_report
    from flashdrive_node.ros.player import PlayOptions
    from flashdrive_node.ros.replay import replay
    from flashdrive_node.ros.session import SessionOptions
    from flashdrive_node.runtime.rig import load_rig

    parameters = {**engine_parameters(args.checkpoint), "device": args.device}
    # A machine without a GPU takes a while for a window, and shows the same results on every run.
    parameters |= {"max_result_age_s": 20.0, "temperature": 0.0}
    result = replay(
        PlayOptions(bag, _RIG, rate=args.rate, duration_s=args.seconds),
        SessionOptions(_RIG, args.out, parameters=parameters),
        args.out / "outputs",
        quiet=args.quiet,
        on_text=lambda text: print(f"     {text}", flush=True),
    )
    if result.interrupted:
        raise KeyboardInterrupt
    played = dataclasses.asdict(result.played)
    return make_report(bag, result.outputs, load_rig(_RIG), played, result.problem)


def engine_parameters(checkpoint: str) -> dict[str, object]:
    """The node's engine: streaming, with all that the bundled checkpoint has for it; exact where it has nothing."""
    parameters: dict[str, object] = {"engine": "streaming", "checkpoint": checkpoint, "stream_mode": "features"}
    if checkpoint != BUNDLED:
        return parameters
    if (overlay := bundled_overlay()) is not None:
        parameters |= {"stream_mode": "kv", "overlay": str(overlay)}
    if (drafter := bundled_drafter()) is not None:
        parameters["drafter"] = str(drafter)
    return parameters


def _write_report(report: ReplayReport, out: Path) -> Path:
    """Print the report and write it; returns the summary picture."""
    from flashdrive_node.evaluation.report_page import summary_lines, write_report
    from flashdrive_node.runtime.rig import load_rig

    files = write_report(report, load_rig(_RIG), out)
    print("\n".join(f"     {line}" for line in summary_lines(report)))
    return files.get("png", out)


def _note(report: ReplayReport) -> str:
    name = str(report.engine.get("checkpoint", ""))
    where = "bundled small model" if name == str(bundled_checkpoint()) else Path(name).name
    return f"Pictures of the procedural world; {where}, {report.engine.get('name', '')}, on {report.conditions['cpu']}"


def _where_to_look(out: Path, bag: Path, summary: Path, seconds: float) -> str:
    return f"""
Done in {seconds:.0f} s. Look at:
  {out / "demo.mp4"}      cameras with the planned path, the world from above, what the model says and what is true
  {summary}   paths, latencies and states in one picture
  {out / "report.html"}   the report (report.json beside it holds the figures)
  {out / "outputs"}       everything the node published: ros2 bag play {out / "outputs"}
  {bag}   the recording that was played"""
