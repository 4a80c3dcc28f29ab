"""``flashdrive train aarl``: train a drafter further by what its drafts would do to the action."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from flashdrive_node.cli.text_options import (
    add_text_options,
    clip_split,
    require_new,
    require_positive,
    streams,
    text_policy,
)
from flashdrive_node.engine.drafter import load_drafter
from flashdrive_node.engine.prompt_slots import prompt_room, tapped_tokens
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.training.aarl import AarlSettings, AarlTrainer, hold
from flashdrive_node.training.aarl_reward import AarlRule
from flashdrive_node.training.drafter_training import DRAFTER
from flashdrive_node.training.text_records import TextRecorder

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", help="checkpoint directory or Hugging Face id of the target")
    parser.add_argument("drafter", type=Path, metavar="DRAFTER", help="directory of a trained drafter, the reference")
    parser.add_argument("out", type=Path, metavar="DIR", help="new directory for drafter, log and plot")
    add_aarl_options(parser)
    parser.add_argument("--minutes", type=float, default=1.0, help="of learning (default: 1)")
    parser.add_argument("--steps", type=int, metavar="N", help="learning steps at most")
    parser.add_argument("--held-out", type=int, default=500, help="texts of each split to measure on (default: 500)")
    add_text_options(parser)


def add_aarl_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how drafts are judged and how long."""
    rule, run_ = AarlRule(), AarlSettings(1.0)
    group = parser.add_argument_group("reinforcement learning")
    group.add_argument("--action-weight", type=float, default=rule.action_weight, help="of the action's quality")
    group.add_argument("--kl-weight", type=float, default=rule.kl_weight, help="of the distance to the reference")
    group.add_argument("--kl-limit", type=float, default=run_.kl_limit, help="nats per guess that end the run")
    group.add_argument("--drafts", type=int, default=rule.drafts, help="drawn per window, 2 or more")
    group.add_argument("--every", type=int, default=run_.every, help="steps between looks at held-out texts")
    group.add_argument(
        "--patience", type=int, default=run_.patience, help="looks without a better one that end the run"
    )
    group.add_argument("--aarl-rate", type=float, default=run_.rate, help="peak learning rate")


def aarl_settings(args: argparse.Namespace, minutes: float, steps: int | None) -> AarlSettings:
    """What the options ask for.

    Raises:
        InputError: Values that make no run.
    """
    require_positive(args, "every", "patience", "kl_limit", "aarl_rate")
    if args.drafts < 2 or args.action_weight < 0 or args.kl_weight < 0 or (steps is not None and steps < 1):
        raise InputError(
            f"--drafts 2 or more, weights of 0 or more and 1 step or more are required, found {args.drafts}, "
            f"{args.action_weight}, {args.kl_weight} and {steps}"
        )
    return AarlSettings(
        minutes=minutes,
        steps=steps,
        every=args.every,
        patience=args.patience,
        kl_limit=args.kl_limit,
        rate=args.aarl_rate,
        seed=args.seed,
        rule=AarlRule(args.action_weight, args.kl_weight, args.drafts),
    )


def run(args: argparse.Namespace) -> int:
    """Train, and write the drafter with its report."""
    require_positive(args, "minutes", "held_out", "max_length", "lanes", "clip_windows")
    settings = aarl_settings(args, args.minutes, args.steps)
    require_new(args.out)
    base = PlainSettings(checkpoint=args.checkpoint, device=args.device)
    device = base.torch_device
    loaded = load_alpamayo(args.checkpoint, device, base.dtype)
    drafter = load_drafter(args.drafter, loaded.model.config, device, base.dtype)
    shape = drafter.config
    policy = text_policy(args, loaded, clip_split(args, "train", device).camera_indices)
    lead = tapped_tokens(shape, prompt_room(loaded.tokenizer, loaded.model.config))
    cells = shape.image_cells if "images" in shape.parts else None
    recorder = TextRecorder(policy, shape.target_layer_ids, lead, cells)
    held = [hold(streams(args, split, recorder), args.held_out, 4, split) for split in ("validation", "test")]
    trainer = AarlTrainer(recorder, drafter, settings)
    trainer.log.conditions |= {"checkpoint": str(args.checkpoint), "weights": loaded.info.sha256}
    trainer.log.conditions |= {"reference": str(args.drafter)}
    trainer.run(streams(args, "train", recorder), *held)
    trainer.save(args.out)
    logger.info("%s: %d bytes of weights", args.out / DRAFTER, trainer.log.result["bytes"])
    return 0
