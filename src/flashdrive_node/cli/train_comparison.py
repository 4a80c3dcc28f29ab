"""``flashdrive train drafters``: train all kinds of drafters on the same texts, and compare them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from flashdrive_node.cli.drafter_options import add_drafter_options, check_drafter_options, learning_of, shape_of
from flashdrive_node.cli.text_options import (
    add_text_options,
    clip_split,
    held_clips,
    require_new,
    require_positive,
    stream_texts,
    streams,
    text_policy,
)
from flashdrive_node.cli.train_aarl import aarl_settings, add_aarl_options
from flashdrive_node.engine.drafter_config import ROTARIES, Rotary
from flashdrive_node.engine.prompt_slots import prompt_room
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.training.aarl import hold
from flashdrive_node.training.comparison import Comparison, Material
from flashdrive_node.training.comparison_report import write_comparison
from flashdrive_node.training.drafter_training import collect
from flashdrive_node.training.rollouts import Samples
from flashdrive_node.training.text_records import TextRecorder

logger = logging.getLogger(__name__)

#: Names of the drafters and their positions; None is DFlash.
KINDS: dict[str, Rotary | None] = {"dflash": None, **{f"routine-{rotary}": rotary for rotary in ROTARIES}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", help="checkpoint directory or Hugging Face id of the target")
    parser.add_argument("out", type=Path, metavar="DIR", help="new directory for drafters and report")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument(
        "--aarl-minutes", type=float, default=0.5, help="of reinforcement learning each; 0 is none (default: 0.5)"
    )
    parser.add_argument("--aarl-steps", type=int, metavar="N", help="and its steps at most")
    parser.add_argument("--timed", type=int, default=60, help="windows of one stream to time each on (default: 60)")
    add_text_options(parser)
    add_drafter_options(parser)
    add_aarl_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train, measure, report."""
    require_positive(args, "minutes", "texts", "held_out", "max_length", "batch", "rate", "matrix_rate", "gamma")
    require_positive(args, "lanes", "clip_windows")
    check_drafter_options(args)
    aarl = aarl_settings(args, args.aarl_minutes, args.aarl_steps) if args.aarl_minutes > 0 else None
    require_new(args.out)
    base = PlainSettings(checkpoint=args.checkpoint, device=args.device)
    device = base.torch_device
    loaded = load_alpamayo(args.checkpoint, device, base.dtype)
    config = loaded.model.config
    source = held_clips(args, device)
    test_clips = clip_split(args, "test", device)
    policy = text_policy(args, loaded, test_clips.camera_indices)
    shapes = {name: shape_of(args, config, KINDS[name]) for name in args.kinds}
    widest = next(iter(shapes.values()))
    lead = max(prompt_room(loaded.tokenizer, config), args.context)
    cells = widest.image_cells if "images" in args.parts else None
    recorder = TextRecorder(policy, widest.target_layer_ids, lead, cells)
    stream = [w.observation for w in islice((w for clip in test_clips.clips() for w in clip.windows), args.timed)]
    args.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(
        Material(
            loaded,
            recorder,
            collect(stream_texts(args, "train", recorder, source), args.texts, "texts"),
            hold(streams(args, "validation", recorder), args.held_out, 4, "validation"),
            hold(streams(args, "test", recorder), args.held_out, 4, "test"),
            stream,
            StreamingSettings(
                checkpoint="",
                device=str(device),
                sampling=SamplingSettings(args.temperature, max_length=args.max_length),
                stream=StreamSettings("kv"),
                seed=args.seed,
            ),
        ),
        learning_of(args, float("inf")),
    )
    comparison.measure_ngrams(args.block)

    def rollouts() -> Iterator[Samples]:
        policy.generator.manual_seed(args.seed)  # the same texts for all
        return streams(args, "train", recorder, source)

    for name, shape in shapes.items():
        comparison.train(name, shape, args.out, aarl, rollouts)
    conditions = {"checkpoint": str(args.checkpoint), "weights": loaded.info.sha256, "device": str(device)}
    conditions |= {name: str(value) for name, value in sorted(vars(args).items()) if name not in ("run", "checkpoint")}
    logger.info("\n%s", write_comparison(args.out, conditions, comparison.rows))
    return 0
