"""``flashdrive train drafter``: a drafter of either variant for a checkpoint, on texts that the checkpoint writes."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator
from pathlib import Path

from flashdrive_node.cli.drafter_options import add_drafter_options, check_drafter_options, learning_of, shape_of
from flashdrive_node.cli.text_options import (
    add_text_options,
    clip_split,
    require_new,
    require_positive,
    stream_texts,
    text_policy,
)
from flashdrive_node.engine.batched_policy import RELEASE_CAMERAS
from flashdrive_node.engine.drafter import load_drafter
from flashdrive_node.engine.drafter_config import ROTARIES, Rotary
from flashdrive_node.engine.prompt_slots import prompt_room, tapped_tokens
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.training.drafter_files import new_drafter
from flashdrive_node.training.drafter_training import DRAFTER, DrafterTrainer
from flashdrive_node.training.drives import Disturbance, DriveJob
from flashdrive_node.training.text_records import TextRecorder, TextRecords, clip_scenes, recorded, world_scenes

logger = logging.getLogger(__name__)

#: Drives of the world: mostly the expert's own, and situations about as often as they occur.
_DISTURBANCE, _BALANCE = Disturbance(share=0.3), 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", help="checkpoint directory or Hugging Face id of the target")
    parser.add_argument("out", type=Path, metavar="DIR", help="new directory for drafter, log and plot")
    parser.add_argument(
        "--variant",
        choices=("dflash", "routine"),
        default="dflash",
        help="what it looks at: the last states, or parts of the prompt as well (default: dflash)",
    )
    parser.add_argument("--rotary", choices=ROTARIES, help="positions, for routine (default: flat)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="drafter to go on from")
    parser.add_argument(
        "--stream-mode",
        choices=("full", "kv"),
        default="full",
        help="how the target reads the windows that it writes about: as it will be deployed (default: full)",
    )
    parser.add_argument(
        "--writing-minutes", type=float, default=math.inf, help="of writing at most (default: no limit)"
    )
    parser.add_argument("--windows", type=int, default=64, help="full: windows that are read at a time (default: 64)")
    parser.add_argument("--workers", type=int, default=8, help="full: processes that compute drives (default: 8)")
    parser.add_argument(
        "--own-vocabulary", action="store_true",
        help="guess none but the tokens of the texts to learn from, which spares reading most of the output head",
    )  # fmt: skip
    add_text_options(parser)
    add_drafter_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and write the drafter with its report."""
    _check(args)
    base = PlainSettings(checkpoint=args.checkpoint, device=args.device)
    device = base.torch_device
    loaded = load_alpamayo(args.checkpoint, device, base.dtype)
    config = loaded.model.config
    # Only recordings have cameras of their own; worlds are drawn when they are needed.
    cameras = RELEASE_CAMERAS if args.bag is None else clip_split(args, "train", device).camera_indices
    policy = text_policy(args, loaded, cameras)
    if args.resume is not None:
        drafter = load_drafter(args.resume, config, device, base.dtype)
    else:
        rotary: Rotary | None = None
        if args.variant == "routine":
            rotary = "flat" if args.rotary is None else args.rotary
        drafter = new_drafter(shape_of(args, config, rotary), loaded.model, args.seed)
    shape = drafter.config
    lead = tapped_tokens(shape, prompt_room(loaded.tokenizer, config))
    cells = shape.image_cells if "images" in shape.parts else None
    recorder = TextRecorder(policy, shape.target_layer_ids, lead, cells)
    trainer = DrafterTrainer(recorder, drafter, learning_of(args, args.writing_minutes))
    trainer.log.conditions |= {"checkpoint": str(args.checkpoint), "weights": loaded.info.sha256}
    trainer.log.conditions |= {"stream_mode": args.stream_mode, "rotary": shape.rotary, "parts": list(shape.parts)}
    trainer.run(_texts(args, recorder, "train"), _texts(args, recorder, "validation"))
    trainer.save(args.out, args.own_vocabulary)
    logger.info("%s: %d bytes of weights", args.out / DRAFTER, trainer.log.result["bytes"])
    return 0


def _check(args: argparse.Namespace) -> None:
    require_positive(args, "minutes", "writing_minutes", "texts", "held_out", "max_length", "batch", "rate")
    require_positive(args, "matrix_rate", "windows", "gamma", "lanes", "clip_windows")
    check_drafter_options(args)
    if args.workers < 0:
        raise InputError(f"--workers 0 or more are required, found {args.workers}")
    if args.variant == "dflash" and args.rotary is not None:
        raise InputError(f"--rotary needs --variant routine, found dflash with {args.rotary}")
    require_new(args.out)


def _texts(args: argparse.Namespace, recorder: TextRecorder, split: str) -> Iterator[TextRecords]:
    if args.stream_mode == "kv":
        return stream_texts(args, split, recorder)
    device, held_out = recorder.policy.model.device, split == "validation"
    if args.bag is not None:
        return recorded(recorder, clip_scenes(clip_split(args, split, device), args.windows, device))
    job = DriveJob(
        split="validation" if held_out else "train",
        first=0,
        scenes=64,
        windows=4 * 64,
        seed=args.seed,
        disturbance=_DISTURBANCE,
        balance=_BALANCE,
    )
    scenes = world_scenes(job, args.windows, device, args.workers, compiled=device.type == "cuda")
    return recorded(recorder, scenes)
