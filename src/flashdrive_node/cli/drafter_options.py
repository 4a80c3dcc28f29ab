"""Options that say what a drafter is and how it learns, the same in every command that trains one."""

from __future__ import annotations

import argparse

from flashdrive_node.engine.drafter_config import PARTS, DrafterConfig, Part, Rotary
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import InputError
from flashdrive_node.training.drafter_files import drafter_config
from flashdrive_node.training.drafter_loss import BlockLoss
from flashdrive_node.training.drafter_training import DrafterSettings


def add_drafter_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    shape = parser.add_argument_group("drafter")
    shape.add_argument("--layers", type=int, default=1, help="decoder layers (default: 1)")
    shape.add_argument("--intermediate-size", type=int, help="of the MLPs (default: the target's)")
    shape.add_argument("--block", type=int, default=8, help="tokens of a block (default: 8)")
    shape.add_argument("--context", type=int, default=4, help="last states that a proposal looks at (default: 4)")
    shape.add_argument("--target-layers", type=int, nargs="+", metavar="N", help="layers whose outputs these are")
    shape.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the prompt, for routine (default: all)"
    )
    shape.add_argument(
        "--image-cells",
        type=int,
        nargs=2,
        default=(2, 3),
        metavar="N",
        help="rows and columns per image (default: 2 3)",
    )
    learning = parser.add_argument_group("learning")
    learning.add_argument("--minutes", type=float, default=3.0, help="of learning, behind the writing (default: 3)")
    learning.add_argument("--steps", type=int, metavar="N", help="learning steps at most")
    learning.add_argument("--texts", type=int, default=20000, help="texts to learn from (default: 20000)")
    learning.add_argument("--held-out", type=int, default=1000, help="texts of other clips to measure on")
    learning.add_argument("--gamma", type=float, default=3.0, help="decay of the weights over a block (default: 3)")
    learning.add_argument("--soft", type=float, default=0.5, help="share of soft labels, 0 to 1 (default: 0.5)")
    learning.add_argument("--batch", type=int, default=2048, help="blocks per step (default: 2048)")
    learning.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of vectors (default: 0.002)")
    learning.add_argument("--matrix-rate", type=float, default=1e-2, help="and of matrices (default: 0.01)")


def check_drafter_options(args: argparse.Namespace) -> None:
    """Refuse what no run can be made of.

    Raises:
        InputError: States it.
    """
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps must be at least 1, found {args.steps}")
    if not 0 <= args.soft <= 1:
        raise InputError(f"--soft 0 to 1 is required, found {args.soft}")


def shape_of(args: argparse.Namespace, target: AlpamayoConfig, rotary: Rotary | None) -> DrafterConfig:
    """Architecture that the options ask for: a routine drafter with these positions, or with None a DFlash one."""
    parts: tuple[Part, ...] = () if rotary is None else tuple(args.parts)
    layer_ids = tuple(sorted(args.target_layers)) if args.target_layers else None
    return drafter_config(
        target,
        args.layers,
        args.intermediate_size,
        args.block,
        args.context,
        layer_ids,
        rotary or "local",
        parts,
        (args.image_cells[0], args.image_cells[1]),
    )


def learning_of(args: argparse.Namespace, writing_minutes: float) -> DrafterSettings:
    """Settings of a run."""
    return DrafterSettings(
        minutes=args.minutes,
        steps=args.steps,
        texts=args.texts,
        held_out=args.held_out,
        writing_minutes=writing_minutes,
        batch=args.batch,
        rate=args.rate,
        matrix_rate=args.matrix_rate,
        seed=args.seed,
        loss=BlockLoss(args.gamma, args.soft),
    )
