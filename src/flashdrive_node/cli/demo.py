"""``flashdrive demo``: a drawn drive through the real node over DDS, with a video, a rosbag and a report at the end."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results (default: out/demo)")
    parser.add_argument("--seconds", type=float, default=14.0, help="length of the drive (default: 14)")
    parser.add_argument("--model-seconds", type=float, default=4.0, help="of these, run the networks too (default: 4)")
    parser.add_argument("--model-rate", type=float, default=0.25, help="and play them at this rate (default: 0.25)")
    parser.add_argument("--seed", type=int, default=0, help="another road, another drive")
    parser.add_argument("--checkpoint", help="a checkpoint to run in place of the small random one")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 0; 1 where a run published nothing; 2 where something could not be started."""
    from tqdm import tqdm

    from flashdrive_node.evaluation.demo_model import write_random_checkpoint
    from flashdrive_node.evaluation.replay_report import read_driven_path, read_outputs
    from flashdrive_node.evaluation.sample_bag import make_synthetic_bag
    from flashdrive_node.evaluation.video import write_video
    from flashdrive_node.ros.player import PROGRESS_BAR
    from flashdrive_node.ros.session import SessionError
    from flashdrive_node.runtime.bag import BagError
    from flashdrive_node.runtime.rig import load_rig

    started = time.monotonic()
    rig = load_rig("sample")
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    bag = out / "drive"
    for name in ("drive", "stand_in", "model", "random_checkpoint"):
        shutil.rmtree(out / name, ignore_errors=True)
    print(f"1/4  drawing a drive of {args.seconds:g} s with four cameras ...", flush=True)
    with tqdm(total=args.seconds, unit="s", disable=args.quiet, desc="drawing", bar_format=PROGRESS_BAR) as bar:

        def show(drawn_s: float) -> None:
            bar.n = drawn_s
            bar.update(0)

        summary = make_synthetic_bag(bag, rig, seconds=args.seconds, seed=args.seed, on_progress=show)
    print(f"     {summary.frames} pictures, {summary.odometry} odometry messages in {bag}")
    try:
        print("2/4  replaying it through the node with the stand-in engine (no model) ...", flush=True)
        stand_in = {"engine": "fake", "fake.latency_s": 0.06}
        published = _replay(args, bag, out / "stand_in", stand_in, args.seconds)
        print("3/4  replaying it through the node with the networks on this machine ...", flush=True)
        checkpoint = args.checkpoint or str(write_random_checkpoint(out / "random_checkpoint", args.seed))
        model: dict[str, object] = {"engine": "plain", "checkpoint": checkpoint}
        if args.checkpoint is None:
            # An untrained network does not end its sentences, and plans what no vehicle could drive.
            model |= {"precision": "float32", "max_generation_length": 12, "require_complete_reasoning": False}
            model |= {"max_result_age_s": 20.0, "device": "cpu", "max_acceleration": 20.0, "max_curvature": 2.0}
        published = min(published, _replay(args, bag, out / "model", model, args.model_seconds, args.model_rate))
    except (BagError, SessionError) as error:
        print(f"flashdrive demo: {error}", file=sys.stderr)
        return 2
    if published:
        print("4/4  drawing the video ...", flush=True)
        driven = read_driven_path(bag, rig)
        records = read_outputs(out / "stand_in" / "outputs").records
        note = "Drawn scene. The engine is the stand-in without a model: it continues the measured speed and yaw rate."
        write_video(out / "demo.mp4", bag, rig, records, driven, [note])
        shutil.copyfile(out / "stand_in" / "summary.png", out / "summary.png")
        shutil.rmtree(out / "random_checkpoint", ignore_errors=True)
    print(_where_to_look(out, time.monotonic() - started))
    return 0 if published else 1


def _replay(
    args: argparse.Namespace,
    bag: Path,
    folder: Path,
    parameters: dict[str, object],
    seconds: float,
    rate: float = 1.0,
) -> int:
    """One replay with its report; returns the number of published windows."""
    from flashdrive_node.evaluation.replay_report import RANDOM_WEIGHTS, make_report
    from flashdrive_node.evaluation.report_page import summary_lines, write_report
    from flashdrive_node.ros.player import PlayOptions
    from flashdrive_node.ros.replay import replay
    from flashdrive_node.ros.session import SessionOptions
    from flashdrive_node.runtime.rig import load_rig

    folder.mkdir(parents=True)
    result = replay(
        PlayOptions(bag, "sample", rate=rate, duration_s=min(seconds, args.seconds)),
        SessionOptions("sample", folder, parameters=parameters),
        folder / "outputs",
        quiet=args.quiet,
        on_text=lambda text: print(f"     {text}", flush=True),
    )
    if result.interrupted:
        raise KeyboardInterrupt
    rig = load_rig("sample")
    random = parameters["engine"] == "plain" and args.checkpoint is None
    notes = [RANDOM_WEIGHTS] if random else []
    report = make_report(bag, result.outputs, rig, dataclasses.asdict(result.played), result.problem, notes)
    write_report(report, rig, folder)
    print("\n".join(f"     {line}" for line in summary_lines(report)))
    return report.published


def _where_to_look(out: Path, seconds: float) -> str:
    return f"""
Done in {seconds:.0f} s. Look at:
  {out / "demo.mp4"}               four cameras, published and driven path, reasoning
  {out / "summary.png"}            latencies and states of the same run
  {out / "stand_in/report.html"}   its report (report.json beside it holds the figures)
  {out / "model/report.html"}      the report of the run with the networks
  {out / "stand_in/outputs"}       everything the node published: ros2 bag play {out / "stand_in/outputs"}
  {out / "drive"}                  the recording that was played"""
