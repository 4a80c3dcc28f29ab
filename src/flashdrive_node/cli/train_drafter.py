"""``flashdrive train drafter``: a DFlash drafter for a checkpoint, on texts that the checkpoint itself writes."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flashdrive_node.engine.batched_policy import RELEASE_CAMERAS, BatchedPolicy
from flashdrive_node.engine.drafter import load_drafter
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.training.drafter_files import drafter_config, new_drafter
from flashdrive_node.training.drafter_loss import BlockLoss
from flashdrive_node.training.drafter_training import DRAFTER, DrafterSettings, DrafterTrainer
from flashdrive_node.training.drives import Disturbance, DriveJob
from flashdrive_node.training.text_records import Scenes, TextRecorder, clip_scenes, world_scenes

if TYPE_CHECKING:
    from flashdrive_node.evaluation.bag_clips import BagClips

logger = logging.getLogger(__name__)

#: Every so many-th clip of a recording is held out.
_HELD_OUT_CLIP = 10
#: Drives of the world: mostly the expert's own, and situations about as often as they occur.
_DISTURBANCE, _BALANCE = Disturbance(share=0.3), 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", help="checkpoint directory or Hugging Face id of the target")
    parser.add_argument("out", type=Path, metavar="DIR", help="new directory for drafter, log and plot")
    parser.add_argument("--bag", type=Path, nargs="+", metavar="BAG", help="rosbag2 recordings in place of the world")
    parser.add_argument("--rig", default="physical_ai", help="of the bags: name or file (default: physical_ai)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of learning, behind the writing (default: 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="learning steps at most")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="drafter to go on from")
    parser.add_argument("--texts", type=int, default=20000, help="texts to learn from (default: 20000)")
    parser.add_argument("--held-out", type=int, default=1000, help="texts of other clips to measure on (default: 1000)")
    parser.add_argument(
        "--writing-minutes", type=float, default=math.inf, help="of writing at most (default: no limit)"
    )
    parser.add_argument("--temperature", type=float, default=0.6, help="of the deployment; 0 is greedy (default: 0.6)")
    parser.add_argument("--max-length", type=int, default=64, help="longest text, tokens (default: 64)")
    parser.add_argument("--layers", type=int, default=1, help="decoder layers (default: 1)")
    parser.add_argument("--intermediate-size", type=int, help="of the MLPs (default: the target's)")
    parser.add_argument("--block", type=int, default=8, help="tokens of a block (default: 8)")
    parser.add_argument("--context", type=int, default=4, help="states that a proposal looks at (default: 4)")
    parser.add_argument("--target-layers", type=int, nargs="+", metavar="N", help="layers whose outputs these are")
    parser.add_argument("--gamma", type=float, default=3.0, help="decay of the weights over a block (default: 3)")
    parser.add_argument("--soft", type=float, default=0.5, help="share of soft labels, 0 to 1 (default: 0.5)")
    parser.add_argument("--batch", type=int, default=2048, help="blocks per step (default: 2048)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of vectors (default: 0.002)")
    parser.add_argument("--matrix-rate", type=float, default=1e-2, help="and of matrices (default: 0.01)")
    parser.add_argument("--windows", type=int, default=64, help="windows that are read at a time (default: 64)")
    parser.add_argument("--workers", type=int, default=8, help="processes that compute drives (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and texts (default: 0)")
    parser.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Train, and write the drafter with its report."""
    _check(args)
    base = PlainSettings(checkpoint=args.checkpoint, device=args.device)
    device = base.torch_device
    loaded = load_alpamayo(args.checkpoint, device, base.dtype)
    source = _recordings(args)
    policy = BatchedPolicy(
        loaded.model,
        loaded.tokenizer,
        temperature=args.temperature,
        seed=args.seed,
        cameras=RELEASE_CAMERAS if source is None else source.camera_indices,
        max_length=args.max_length,
    )
    config = loaded.model.config
    if args.resume is not None:
        drafter = load_drafter(args.resume, config, device, base.dtype)
    else:
        layer_ids = tuple(sorted(args.target_layers)) if args.target_layers else None
        shape = drafter_config(
            config, args.layers, args.intermediate_size, args.block, args.context, layer_ids
        )  # fmt: skip
        drafter = new_drafter(shape, loaded.model, args.seed)
    recorder = TextRecorder(policy, drafter.config.target_layer_ids, drafter.config.context_length)
    settings = DrafterSettings(
        minutes=args.minutes,
        steps=args.steps,
        texts=args.texts,
        held_out=args.held_out,
        writing_minutes=args.writing_minutes,
        batch=args.batch,
        rate=args.rate,
        matrix_rate=args.matrix_rate,
        seed=args.seed,
        loss=BlockLoss(args.gamma, args.soft),
    )
    trainer = DrafterTrainer(recorder, drafter, settings)
    trainer.log.conditions |= {"checkpoint": str(args.checkpoint), "weights": loaded.info.sha256}
    trainer.run(*(_scenes(args, source, device, held_out) for held_out in (False, True)))
    trainer.save(args.out)
    logger.info("%s: %d bytes of weights", args.out / DRAFTER, trainer.log.result["bytes"])
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in (
        "minutes",
        "writing_minutes",
        "texts",
        "held_out",
        "max_length",
        "batch",
        "rate",
        "matrix_rate",
        "windows",
        "gamma",
    ):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, found {getattr(args, name)}")
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps must be at least 1, found {args.steps}")
    if not 0 <= args.soft <= 1 or args.workers < 0:
        raise InputError(f"--soft 0 to 1 and --workers 0 or more are required, found {args.soft} and {args.workers}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out}: a new or empty directory is required")


def _recordings(args: argparse.Namespace) -> BagClips | None:
    if args.bag is None:
        return None
    from flashdrive_node.evaluation.bag_clips import BagClips
    from flashdrive_node.runtime.rig import RigError, load_rig

    try:
        return BagClips(args.bag, load_rig(args.rig))
    except RigError as error:
        raise InputError(str(error)) from error


def _scenes(
    args: argparse.Namespace, source: BagClips | None, device: torch.device, held_out: bool
) -> Iterator[Scenes]:
    if source is not None:
        return clip_scenes(source, args.windows, device, lambda number: (number % _HELD_OUT_CLIP == 0) == held_out)
    job = DriveJob(
        split="validation" if held_out else "train",
        first=0,
        scenes=64,
        windows=4 * 64,
        seed=args.seed,
        disturbance=_DISTURBANCE,
        balance=_BALANCE,
    )
    return world_scenes(job, args.windows, device, args.workers, compiled=device.type == "cuda")
