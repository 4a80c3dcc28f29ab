"""``flashdrive quantize``: a checkpoint for a precision that is calibrated on windows of its use."""

from __future__ import annotations

import argparse
from pathlib import Path

from flashdrive_node.cli.clip_options import add_clip_options, clip_source
from flashdrive_node.cli.engine_options import overlay_of
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.clip import ClipError
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.loading import load_alpamayo
from flashdrive_node.model.precision import PRESETS, W4A8, StagePrecision
from flashdrive_node.model.source import tokenizer_directory
from flashdrive_node.training.layer_inputs import InputSettings
from flashdrive_node.training.quantisation import quantise_checkpoint
from flashdrive_node.training.quantisation_report import markdown, write_report
from flashdrive_node.training.rotation_fit import METHODS, FitSettings

#: Of a clip: two of them, a second apart, with the default stride.
_CLIP_WINDOWS = 11


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    windows, fitting = InputSettings(), FitSettings()
    parser.add_argument("checkpoint", help="checkpoint directory or Hugging Face id")
    parser.add_argument("out", type=Path, metavar="OUT", help="new directory; layers that are done lie in OUT.parts")
    parser.add_argument(
        "--preset",
        default="w4a8",
        help=f"{', '.join(name for name in PRESETS if name != 'bf16')}, or STAGE=FORMAT,... (default: w4a8)",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=fitting.method,
        help="of rounding (default: paroquant); nearest leaves fp8 to the reader",
    )
    add_clip_options(parser, _CLIP_WINDOWS)
    parser.add_argument("--limit", type=int, default=windows.windows, help="windows in all (default: 16)")
    parser.add_argument("--stride", type=int, default=windows.stride, help="take every so-manieth (default: 10)")
    parser.add_argument("--rows", type=int, default=windows.rows, help="inputs kept per layer and window (default: 96)")
    parser.add_argument(
        "--steps", type=int, default=fitting.steps, help="of learning scales and rotations, per layer (default: 100)"
    )
    parser.add_argument(
        "--no-second-stage", action="store_true", help="round to the nearest behind scales and rotations"
    )
    parser.add_argument(
        "--layers-alone",
        action="store_true",
        help="leave each text layer as it is fitted on the original's inputs; else all are then rounded in order",
    )
    parser.add_argument(
        "--tuning-passes",
        type=int,
        default=fitting.tuning_passes,
        metavar="N",
        help="over the windows, to learn all text layers' scales together; 0 leaves that out (default: 5)",
    )
    parser.add_argument("--rate", type=float, default=fitting.rate, help="of learning (default: 0.03)")
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="PATH",
        help="fine-tuned expert to put over the checkpoint's first, or 'bundled'",
    )
    parser.add_argument("--seed", type=int, default=0, help="of pairs, rows and texts (default: 0)")
    parser.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and the error of each layer, and print that."""
    stages = StagePrecision.parse(args.preset)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise CheckpointError(str(args.out), ["a new or empty directory is required, found one in use"])
    engine = PlainSettings(args.checkpoint, device=args.device)
    source = clip_source(args, engine.torch_device)
    loaded = load_alpamayo(args.checkpoint, engine.torch_device, engine.dtype, overlay=overlay_of(args))
    inputs = InputSettings(args.limit, args.stride, args.rows, args.seed)
    settings = FitSettings(
        args.method,
        args.steps,
        not args.no_second_stage,
        in_order=not args.layers_alone,
        tuning_passes=args.tuning_passes,
        rate=args.rate,
        int8_inputs=stages.prefill == W4A8,
        seed=args.seed,
    )
    tokenizer_files = tokenizer_directory(loaded.info.path, loaded.model.config)
    try:
        report = quantise_checkpoint(loaded, source, stages, args.out, tokenizer_files, inputs, settings)
    except ClipError as error:
        raise InputError(str(error)) from error
    write_report(report, args.out)
    print(markdown(report))
    print(f"written to {args.out}")
    return 0
