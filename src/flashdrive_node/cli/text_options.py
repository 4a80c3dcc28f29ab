"""Options that say which texts drafters learn from and are measured on, the same in every command that trains one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.evaluation.clip import Clip, ClipSource, parse_range
from flashdrive_node.evaluation.lockstep import HeldClips
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.training.rollouts import Rollouts, RolloutSettings, Samples
from flashdrive_node.training.text_records import TextRecorder, TextRecords

#: Every so many-th clip of a recording is held out to choose by, and the one behind it to measure on.
HELD_OUT_CLIP = 10
#: Streams that nothing disturbs, to measure on.
_CALM = {"reset": 0.0, "drop": 0.0, "refresh_every": (0,), "refresh_views": 0.0}


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = parser.add_argument_group("texts")
    group.add_argument("--bag", type=Path, nargs="+", metavar="BAG", help="rosbag2 recordings in place of the world")
    group.add_argument("--rig", default="physical_ai", help="of the bags: name or file (default: physical_ai)")
    group.add_argument("--world", default="train:0-4095", metavar="SPLIT:FIRST-LAST", help="streams to learn from")
    group.add_argument("--validation-world", default="validation:0-63", metavar="SPLIT:FIRST-LAST")
    group.add_argument("--test-world", default="test:0-63", metavar="SPLIT:FIRST-LAST", help="only measured on")
    group.add_argument("--clip-windows", type=int, default=30, help="windows of a stream's clip (default: 30)")
    group.add_argument(
        "--clips", type=int, default=0, help="to learn from: drawn once and kept, 18 MB each (default: all, anew)"
    )
    group.add_argument("--lanes", type=int, default=32, help="streams side by side (default: 32)")
    group.add_argument("--temperature", type=float, default=0.6, help="of the deployment; 0 is greedy (default: 0.6)")
    group.add_argument("--max-length", type=int, default=64, help="longest text, tokens (default: 64)")
    group.add_argument("--seed", type=int, default=0, help="of weights, scenes and texts (default: 0)")
    group.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")


def clip_split(args: argparse.Namespace, split: str, device: torch.device) -> ClipSource:
    """Clips of one of the splits "train", "validation" and "test".

    Raises:
        InputError: Recordings or worlds that cannot be used.
    """
    if args.bag is not None:
        from flashdrive_node.evaluation.bag_clips import BagClips
        from flashdrive_node.runtime.rig import RigError, load_rig

        rest = {"validation": 0, "test": 1}.get(split)
        try:
            source = BagClips(args.bag, load_rig(args.rig))
        except RigError as error:
            raise InputError(str(error)) from error
        if rest is None:
            return ChosenClips(source, lambda number: number % HELD_OUT_CLIP not in (0, 1))
        return ChosenClips(source, lambda number: number % HELD_OUT_CLIP == rest)
    from flashdrive_node.evaluation.world_clips import WorldClips

    name = {"train": "world", "validation": "validation_world", "test": "test_world"}[split]
    world, _, indices = getattr(args, name).partition(":")
    chosen = parse_range(indices, f"--{name.replace('_', '-')}")
    return WorldClips(world, chosen, args.clip_windows, device=device)


class ChosenClips:
    """Some clips of a source, by their numbers."""

    def __init__(self, source: ClipSource, wanted: Callable[[int], bool]):
        self.source, self.wanted = source, wanted
        self.name, self.camera_indices = source.name, source.camera_indices

    def __len__(self) -> int:
        return 0  # not known beforehand

    def clips(self) -> Iterator[Clip]:
        """The chosen ones, in order."""
        return (clip for number, clip in enumerate(self.source.clips()) if self.wanted(number))


def text_policy(args: argparse.Namespace, loaded: LoadedModel, cameras: tuple[int, ...]) -> BatchedPolicy:
    """The target as it writes texts."""
    return BatchedPolicy(
        loaded.model,
        loaded.tokenizer,
        temperature=args.temperature,
        seed=args.seed,
        cameras=cameras,
        max_length=args.max_length,
    )


def held_clips(args: argparse.Namespace, device: torch.device) -> ClipSource:
    """Clips to learn from; so many as `--clips` says are drawn once and kept, all where it says none.

    Raises:
        InputError: As `clip_split`.
    """
    source = clip_split(args, "train", device)
    return HeldClips(source, args.clips) if args.clips else source


def streams(
    args: argparse.Namespace, split: str, recorder: TextRecorder, source: ClipSource | None = None
) -> Iterator[Samples]:
    """Windows of streams with their texts: disturbed without end to learn from, else calm and one pass.

    Args:
        args: Parsed.
        split: See `clip_split`.
        recorder: Makes the records.
        source: Clips to use in place of the split's own.

    Raises:
        InputError: As `clip_split`.
    """
    learning, device = split == "train", recorder.policy.model.device
    if source is None:
        source = held_clips(args, device) if learning else clip_split(args, split, device)
    disturbances: dict[str, Any] = {"staggered": True} if learning else _CALM
    way = RolloutSettings(lanes=args.lanes, **disturbances)
    return Rollouts(recorder.policy, source, way, args.seed, repeat=learning, recorder=recorder)


def stream_texts(
    args: argparse.Namespace, split: str, recorder: TextRecorder, source: ClipSource | None = None
) -> Iterator[TextRecords]:
    """The texts alone, arguments as in `streams`."""
    for samples in streams(args, split, recorder, source):
        if samples.records is not None:
            yield samples.records


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse options that are not more than 0.

    Raises:
        InputError: Names the first.
    """
    for name in names:
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, found {getattr(args, name)}")


def require_new(directory: Path) -> None:
    """Refuse a directory that is in use.

    Raises:
        InputError: It is.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: a new or empty directory is required")
