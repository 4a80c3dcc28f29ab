"""``flashdrive train``: train the small model in the procedural world."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from flashdrive_node.cli import train_aarl, train_comparison, train_drafter, train_streaming
from flashdrive_node.model.errors import InputError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    actions = parser.add_subparsers(title="what is trained", dest="what", metavar="WHAT", required=True)
    vla = actions.add_parser(
        "vla",
        help="the model itself, from nothing or from an earlier stage",
        description="Train the small Alpamayo. Several GPUs: torchrun --nproc-per-node N -m flashdrive_node.cli.main "
        "train vla ...",
    )
    drafter = actions.add_parser(
        "drafter", help="a drafter for speculative decoding, on texts that a checkpoint writes"
    )
    train_drafter.add_arguments(drafter)
    aarl = actions.add_parser("aarl", help="a trained drafter further, by what its drafts would do to the action")
    train_aarl.add_arguments(aarl)
    drafters = actions.add_parser("drafters", help="all kinds of drafters on the same texts, compared")
    train_comparison.add_arguments(drafters)
    streaming = actions.add_parser("streaming", help="the action expert of a checkpoint, fine-tuned to streams")
    train_streaming.add_arguments(streaming)
    vla.add_argument("out", type=Path, metavar="DIR", help="new directory for checkpoint, history baseline and log")
    vla.add_argument("--minutes", type=float, default=10.0, help="time of training, behind start-up (default: 10)")
    vla.add_argument("--resume", type=Path, metavar="DIR", help="directory of an earlier stage to go on from")
    vla.add_argument(
        "--own-drives", type=float, default=0.0, help="share of windows from the model's own drives (default: 0)"
    )
    vla.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")
    vla.add_argument("--batch", type=int, default=96, help="windows per step and GPU (default: 96)")
    vla.add_argument("--reuse", type=float, default=2.5, help="uses of every window on average (default: 2.5)")
    vla.add_argument("--rate", type=float, default=1.2e-3, help="peak learning rate (default: 0.0012)")
    vla.add_argument("--buffer", type=int, default=16384, help="windows kept, 2.2 MB each (default: 16384)")
    vla.add_argument("--workers", type=int, default=8, help="processes per GPU that compute drives (default: 8)")
    vla.add_argument("--seed", type=int, default=0, help="of weights, scenes and noise (default: 0)")
    vla.add_argument("--compile-layers", action="store_true", help="fuse the layers of the networks with torch.compile")


def run(args: argparse.Namespace) -> int:
    """Train what is asked for."""
    others = {
        "drafter": train_drafter.run,
        "aarl": train_aarl.run,
        "drafters": train_comparison.run,
        "streaming": train_streaming.run,
    }
    return others.get(args.what, _vla)(args)


def _vla(args: argparse.Namespace) -> int:
    from flashdrive_node.training.stage import run_stage
    from flashdrive_node.training.vla import TrainingSettings

    for name in ("minutes", "batch", "reuse", "rate", "buffer"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name} must be positive, found {getattr(args, name)}")
    if not 0 <= args.own_drives < 1:
        raise InputError(f"--own-drives must be at least 0 and less than 1, found {args.own_drives}")
    if args.workers < 0:
        raise InputError(f"--workers must be 0 or more, found {args.workers}")
    settings = TrainingSettings(
        minutes=args.minutes,
        batch=args.batch,
        reuse=args.reuse,
        rate=args.rate,
        buffer=args.buffer,
        workers=args.workers,
        seed=args.seed,
        own_drives=args.own_drives,
        compiled_layers=args.compile_layers,
    )
    result = run_stage(args.out, settings, device=args.device, resume=args.resume)
    if result is not None:
        logger.info(
            "%s: ADE %.2f m, by history alone %.2f m; %.1f %% of the decisions right",
            args.out,
            result["ade_m"],
            result["history_ade_m"],
            100 * result["class_accuracy"],
        )
    return 0
