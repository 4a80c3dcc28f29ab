"""``flashdrive schedule``: the flow steps that are worth an evaluation, found on windows of a checkpoint's use."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from flashdrive_node.cli.clip_options import add_clip_options, clip_source
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.clip import ClipError
from flashdrive_node.evaluation.flow_probe import FlowProbe
from flashdrive_node.evaluation.schedule_report import figure_png, markdown
from flashdrive_node.evaluation.schedule_search import SearchSettings, search
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.model.sampling import SamplingSettings

#: Of a clip: two of them, a second apart, with the default stride.
_CLIP_WINDOWS = 11


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    standard = SearchSettings()
    parser.add_argument("checkpoint", help="checkpoint directory or Hugging Face id")
    add_clip_options(parser, _CLIP_WINDOWS)
    parser.add_argument("--evaluations", type=int, default=standard.evaluations, help="wanted (default: 4)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=list(standard.steps), help="chosen from (default: 8 10)"
    )
    parser.add_argument("--limit", type=int, default=standard.limit, help="windows in all (default: 100)")
    parser.add_argument("--stride", type=int, default=standard.stride, help="take every so-manieth (default: 10)")
    parser.add_argument("--samples", type=int, default=1, help="trajectories per window (default: 1)")
    parser.add_argument("--max-generation-length", type=int, default=128, help="longest text, tokens (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="of texts and noise (default: 0)")
    parser.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")
    parser.add_argument("--precision", default="auto", help="float32, bfloat16 or auto")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write schedule.json, schedule.md and schedule.png")


def run(args: argparse.Namespace) -> int:
    """Print the table of candidates."""
    settings = SearchSettings(args.evaluations, tuple(args.steps), args.limit, args.stride, args.seed)
    engine = PlainSettings(args.checkpoint, device=args.device, precision=args.precision, samples=args.samples)
    sampling = replace(SamplingSettings(), max_length=args.max_generation_length)
    source = clip_source(args, engine.torch_device)
    loaded = load_alpamayo(args.checkpoint, engine.torch_device, engine.dtype)
    try:
        result = search(FlowProbe(loaded, args.samples, sampling), source, settings)
    except ClipError as error:
        raise InputError(str(error)) from error
    print(markdown(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "schedule.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
        (args.out / "schedule.md").write_text(markdown(result) + "\n", encoding="utf-8")
        (args.out / "schedule.png").write_bytes(figure_png(result))
        print(f"written to {args.out}")
    return 0
