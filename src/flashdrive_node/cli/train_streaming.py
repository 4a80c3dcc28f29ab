"""``flashdrive train streaming``: fine-tune the action expert of a checkpoint to streams of windows."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from flashdrive_node.cli.clip_options import add_clip_options, clip_source
from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.clip import PROTOCOL_WINDOWS
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.training.rollouts import Rollouts, RolloutSettings
from flashdrive_node.training.streaming_training import OVERLAY, StreamingTrainer, StreamingTrainingSettings

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", help="checkpoint directory or Hugging Face id")
    parser.add_argument("out", type=Path, metavar="DIR", help="new directory for overlay, log and plot")
    add_clip_options(parser, PROTOCOL_WINDOWS)
    parser.add_argument("--validation-bag", type=Path, nargs="+", metavar="BAG", help="recordings to measure on")
    parser.add_argument(
        "--validation-world", metavar="SPLIT:FIRST-LAST", default="validation:0-63", help="default: validation:0-63"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="of training (default: 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps at most")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="overlay to go on from")
    parser.add_argument(
        "--tensors", nargs="+", default=["*"], metavar="PATTERN",
        help="which of the expert's tensors learn and are written, such as '*.q_proj.*' (default: all)",
    )  # fmt: skip
    parser.add_argument("--lanes", type=int, default=32, help="streams side by side (default: 32)")
    parser.add_argument("--distil", type=float, default=0.5, help="share of the distillation, 0 to 1 (default: 0.5)")
    parser.add_argument("--rate", type=float, default=1e-4, help="peak learning rate of vectors (default: 0.0001)")
    parser.add_argument("--matrix-rate", type=float, default=3e-4, help="and of matrices (default: 0.0003)")
    parser.add_argument("--draws", type=int, default=4, help="noisy actions per sample (default: 4)")
    parser.add_argument("--reuse", type=int, default=3, help="steps per fresh batch of samples (default: 3)")
    parser.add_argument("--held-out", type=int, default=24, help="batches of samples to measure on (default: 24)")
    parser.add_argument("--temperature", type=float, default=0.6, help="of the deployment; 0 is greedy (default: 0.6)")
    parser.add_argument("--max-length", type=int, default=64, help="longest text, tokens (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of rollouts, texts and noise (default: 0)")
    parser.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Train, and write the overlay with its report."""
    _check(args)
    base = PlainSettings(checkpoint=args.checkpoint, device=args.device)
    device = base.torch_device
    source = clip_source(args, device)
    other = {"bag": args.validation_bag} if args.bag is not None else {"world": args.validation_world}
    held_out = clip_source(argparse.Namespace(**(vars(args) | other)), device)
    loaded = load_alpamayo(args.checkpoint, device, base.dtype, overlay=args.resume)
    policy = BatchedPolicy(
        loaded.model,
        loaded.tokenizer,
        temperature=args.temperature,
        seed=args.seed,
        cameras=source.camera_indices,
        max_length=args.max_length,
    )
    settings = StreamingTrainingSettings(
        minutes=args.minutes,
        steps=args.steps,
        draws=args.draws,
        reuse=args.reuse,
        rate=args.rate,
        matrix_rate=args.matrix_rate,
        tensors=tuple(args.tensors),
        distil=args.distil,
        validation=args.held_out,
        seed=args.seed,
    )
    trainer = StreamingTrainer(loaded.model, settings)
    trainer.log.conditions |= {"checkpoint": str(args.checkpoint), "weights": loaded.info.sha256, "source": source.name}
    way = RolloutSettings(lanes=args.lanes, staggered=True)
    training = Rollouts(policy, source, way, args.seed, fresh=args.distil > 0)
    # Without what disturbs streams, and compared with windows from scratch.
    calm = RolloutSettings(lanes=args.lanes, reset=0.0, drop=0.0, refresh_every=(0,), refresh_views=0.0)
    measured = Rollouts(policy, held_out, calm, args.seed, fresh=True, repeat=False)
    trainer.run(training, measured)
    trainer.save(args.out)
    logger.info("%s: %d bytes of weights", args.out / OVERLAY, trainer.log.result["bytes"])
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("minutes", "lanes", "rate", "matrix_rate", "draws", "reuse", "held_out", "max_length"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, found {getattr(args, name)}")
    if not 0 <= args.distil <= 1 or (args.steps is not None and args.steps < 1):
        raise InputError(f"--distil 0 to 1 and --steps 1 or more are required, found {args.distil} and {args.steps}")
    if (args.bag is None) != (args.validation_bag is None):
        raise InputError("--bag and --validation-bag are required together, found one of them")
    if args.physical_ai is not None:
        raise InputError("--bag or --world is required, found --physical-ai: it has no split to measure on")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out}: a new or empty directory is required")
