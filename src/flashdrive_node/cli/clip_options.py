"""Options that choose windows to run a model on: recordings, worlds or PhysicalAI clips, the same in every command."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flashdrive_node.evaluation.clip import ClipSource, parse_range
from flashdrive_node.model.errors import InputError


def add_clip_options(parser: argparse.ArgumentParser, windows: int) -> None:
    """Declare them; `windows` is how many of a clip are taken by default."""
    source = parser.add_argument_group("what to drive over, one of")
    source.add_argument("--bag", type=Path, nargs="+", metavar="BAG", help="rosbag2 recordings of one rig")
    source.add_argument("--world", metavar="SPLIT:FIRST-LAST", help="scenes of the world, such as test:0-199")
    source.add_argument("--physical-ai", type=Path, metavar="DIR", help="PhysicalAI-Autonomous-Vehicles, downloaded")
    parser.add_argument("--rig", default="physical_ai", help="of the bags: name or file (default: physical_ai)")
    parser.add_argument("--clips", nargs="+", metavar="ID", help="of PhysicalAI (default: all that are there)")
    parser.add_argument("--windows", type=int, default=windows, help=f"per clip at most (default: {windows})")
    parser.add_argument("--image-size", default="160x288", help="of the world, height x width (default: 160x288)")


def image_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the world's pictures, pixels.

    Raises:
        InputError: The option is no size.
    """
    height, _, width = args.image_size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"--image-size: HEIGHTxWIDTH such as 160x288 is required, found {args.image_size!r}")
    return int(height), int(width)


def clip_source(args: argparse.Namespace, device: torch.device | str) -> ClipSource:
    """The clips that the options ask for.

    Args:
        args: Parsed.
        device: Where worlds are rendered.

    Raises:
        InputError: Not one source, or one that cannot be used.
    """
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
    return WorldClips(split, parse_range(indices, "--world"), args.windows, image_size(args), device)
