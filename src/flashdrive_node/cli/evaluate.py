"""``flashdrive evaluate``: a checkpoint in open loop over recordings, worlds or PhysicalAI clips."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashdrive_node.cli.clip_options import add_clip_options, clip_source, image_size
from flashdrive_node.cli.engine_options import add_engine_options, described, engine_settings, make_engine
from flashdrive_node.evaluation.clip import PROTOCOL_WINDOWS, ClipSource
from flashdrive_node.evaluation.evaluation import ResultFolder, Shard, evaluate
from flashdrive_node.evaluation.evaluation_report import markdown, write_report
from flashdrive_node.evaluation.evaluation_summary import add_baseline, summarise
from flashdrive_node.evaluation.flow_probe import flow_change
from flashdrive_node.evaluation.sabotage import CACHE, KINDS, BlankedEngine, SabotagedClips
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory or Hugging Face id")
    add_clip_options(parser, PROTOCOL_WINDOWS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; a run that was cut goes on")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="results to compare with, window by window")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th clip, from number I on")
    parser.add_argument(
        "--sabotage", choices=KINDS, help="lie to the engine in every window: the figures must become clearly worse"
    )
    parser.add_argument("--report-only", action="store_true", help="no engine: put together what is in --out")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and report. Returns 1 where clips or windows ended in a problem."""
    folder = ResultFolder(args.out)
    if not args.report_only:
        answer_clips(args, folder, look_at_flow=True)
        if Shard.parse(args.shard).of > 1:
            print(f"clips {args.shard} are done; --report-only puts all together")
            return 0
    clips = folder.read()
    summary = summarise(folder.settings(), clips)
    if args.baseline is not None:
        add_baseline(summary, clips, str(args.baseline), ResultFolder(args.baseline).read())
    print(markdown(summary))
    for path in write_report(summary, clips, args.out):
        print(f"wrote {path}")
    return 1 if summary.problems else 0


def answer_clips(
    args: argparse.Namespace,
    folder: ResultFolder,
    loaded: LoadedModel | None = None,
    source: ClipSource | None = None,
    look_at_flow: bool = False,
    only_prepare: bool = False,
) -> LoadedModel | None:
    """Step the engine that the options choose through the clips that they choose.

    Args:
        args: Parsed, of this command or one with the same options.
        folder: Takes the results.
        loaded: The checkpoint, where it is in memory already.
        source: Clips in place of those that the options choose.
        look_at_flow: Whether the flow of some windows is integrated once more, for how its velocity changes.
        only_prepare: Answer nothing: load the checkpoint, and say in the folder what its results would be.

    Returns:
        The checkpoint, for another engine.

    Raises:
        InputError: No checkpoint is named, options do not go together, or the folder holds something else.
    """
    if args.checkpoint is None:
        raise InputError("a checkpoint is required, or --report-only")
    shard = Shard.parse(vars(args).get("shard", "0/1"))
    sabotage = vars(args).get("sabotage")
    settings = engine_settings(args, image_size(args))
    engine = BlankedEngine(settings) if sabotage == CACHE else make_engine(settings)
    engine.loaded = loaded
    info = engine.load()
    source = source or clip_source(args, engine.settings.torch_device)
    if sabotage is not None:
        source = SabotagedClips(source, sabotage)
    # The weights by their hash: the same checkpoint may lie elsewhere when a run goes on.
    weights = {"weights": info.sha256 or info.checkpoint, "windows": args.windows}
    folder.prepare(described(args) | weights | {"source": source.name})
    loaded = engine.loaded
    assert loaded is not None
    if not only_prepare:
        if engine.settings.torch_device.type == "cuda":
            engine.warm_up()
        evaluate(engine, source, folder, shard, flow_change(loaded, settings) if look_at_flow else None)
    engine.close()
    return loaded
