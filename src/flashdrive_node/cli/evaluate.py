"""``flashdrive evaluate``: a checkpoint in open loop over recordings, worlds or PhysicalAI clips."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashdrive_node.cli.engine_options import add_engine_options, described, engine_settings, make_engine
from flashdrive_node.evaluation.clip import PROTOCOL_WINDOWS, ClipSource, parse_range
from flashdrive_node.evaluation.evaluation import ResultFolder, Shard, evaluate
from flashdrive_node.evaluation.evaluation_report import markdown, write_report
from flashdrive_node.evaluation.evaluation_summary import add_baseline, summarise
from flashdrive_node.model.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory or Hugging Face id")
    source = parser.add_argument_group("what to drive over, one of")
    source.add_argument("--bag", type=Path, nargs="+", metavar="BAG", help="rosbag2 recordings of one rig")
    source.add_argument("--world", metavar="SPLIT:FIRST-LAST", help="scenes of the world, such as test:0-199")
    source.add_argument("--physical-ai", type=Path, metavar="DIR", help="PhysicalAI-Autonomous-Vehicles, downloaded")
    parser.add_argument("--rig", default="physical_ai", help="of the bags: name or file (default: physical_ai)")
    parser.add_argument("--clips", nargs="+", metavar="ID", help="of PhysicalAI (default: all that are there)")
    parser.add_argument("--windows", type=int, default=PROTOCOL_WINDOWS, help="per clip at most (default: 120)")
    parser.add_argument("--image-size", default="160x288", help="of the world, height x width (default: 160x288)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; a run that was cut goes on")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="results to compare with, window by window")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th clip, from number I on")
    parser.add_argument("--report-only", action="store_true", help="no engine: put together what is in --out")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and report. Returns 1 where clips or windows ended in a problem."""
    folder = ResultFolder(args.out)
    if not args.report_only:
        shard = Shard.parse(args.shard)
        _evaluate(args, folder, shard)
        if shard.of > 1:
            print(f"clips {shard.index} of {shard.of} are done; --report-only puts all together")
            return 0
    clips = folder.read()
    summary = summarise(folder.settings(), clips)
    if args.baseline is not None:
        add_baseline(summary, clips, str(args.baseline), ResultFolder(args.baseline).read())
    print(markdown(summary))
    for path in write_report(summary, clips, args.out):
        print(f"wrote {path}")
    return 1 if summary.problems else 0


def _evaluate(args: argparse.Namespace, folder: ResultFolder, shard: Shard) -> None:
    if args.checkpoint is None:
        raise InputError("a checkpoint is required, or --report-only")
    size = _image_size(args.image_size)
    engine = make_engine(engine_settings(args, size))
    info = engine.load()
    source = _source(args, size, str(engine.settings.torch_device))
    # The weights by their hash: the same checkpoint may lie elsewhere when a run goes on.
    weights = {"weights": info.sha256 or info.checkpoint, "windows": args.windows}
    folder.prepare(described(args) | weights | {"source": source.name})
    if engine.settings.torch_device.type == "cuda":
        engine.warm_up()
    evaluate(engine, source, folder, shard)


def _source(args: argparse.Namespace, size: tuple[int, int], device: str) -> ClipSource:
    given = [name for name in ("bag", "world", "physical_ai") if getattr(args, name) is not None]
    if len(given) != 1:
        raise InputError(f"one of --bag, --world and --physical-ai is required, found {given or 'none'}")
    if args.bag is not None:
        from flashdrive_node.evaluation.bag_clips import BagClips
        from flashdrive_node.runtime.rig import RigError, load_rig

        try:
            return BagClips(args.bag, load_rig(args.rig), args.windows)
        except RigError as error:
            raise InputError(str(error)) from error
    if args.physical_ai is not None:
        from flashdrive_node.evaluation.physical_ai import PhysicalAIClips

        return PhysicalAIClips(args.physical_ai, args.clips, args.windows)
    from flashdrive_node.evaluation.world_clips import WorldClips

    split, _, indices = args.world.partition(":")
    return WorldClips(split, parse_range(indices, "--world"), args.windows, size, device)


def _image_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"--image-size: HEIGHTxWIDTH such as 160x288 is required, found {text!r}")
    return int(height), int(width)
