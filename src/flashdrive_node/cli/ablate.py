"""``flashdrive ablate``: what each shortcut of the streaming engine costs in accuracy and gains in time."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flashdrive_node.cli.clip_options import add_clip_options, clip_source, image_size
from flashdrive_node.cli.engine_options import add_engine_options, engine_settings
from flashdrive_node.cli.evaluate import answer_clips
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.ablation import DRIVES, LATENCY, SAME_AS, read_ablation
from flashdrive_node.evaluation.ablation_report import markdown, write_ablation
from flashdrive_node.evaluation.ablation_runs import PARTS, ConfiguredDrives, read_drives, same_as, write_drives
from flashdrive_node.evaluation.clip import PROTOCOL_WINDOWS
from flashdrive_node.evaluation.closed_loop_run import RunSettings
from flashdrive_node.evaluation.devices import devices_of, spread_each
from flashdrive_node.evaluation.evaluation import ResultFolder
from flashdrive_node.evaluation.lockstep import HeldClips, LockstepWork
from flashdrive_node.evaluation.policies import weights_of
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel

T = TypeVar("T")

_OFF: dict[str, Any] = {
    "engine": "streaming", "stream_mode": "features", "refresh_every": None, "refresh_views": False,
    "drafter": None, "overlay": None, "flow_schedule": None, "shared_text": False,
}  # fmt: skip
#: Options of each configuration; a name alone takes the value given on the command line.
CONFIGURATIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": ((), {"engine": "plain", "stream_mode": None}),
    "features": ((), {}),
    "kv": ((), {"stream_mode": "kv"}),
    "kv-refresh": ((), {"stream_mode": "kv", "refresh_every": 10}),
    "kv-views": ((), {"stream_mode": "kv", "refresh_views": True}),
    "kv-tuned": (("overlay",), {"stream_mode": "kv"}),
    "speculative": (("drafter",), {}),
    "flow": (("flow_schedule",), {}),
    "all-features": (("drafter", "flow_schedule"), {}),
    "all": (("drafter", "flow_schedule", "overlay"), {"stream_mode": "kv"}),
}
#: Of a precision: it is also the name of a folder.
_NAME = re.compile(r"[\w-]+")
#: What a configuration goes without where it is not given.
_OPTIONAL = {"all": ("overlay",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory or Hugging Face id")
    parser.add_argument(
        "--configurations", nargs="+", choices=sorted(CONFIGURATIONS), metavar="NAME",
        help=f"of {', '.join(CONFIGURATIONS)}; the first is compared with (default: all whose files are given)",
    )  # fmt: skip
    parser.add_argument(
        "--precisions", nargs="+", metavar="NAME[=CHECKPOINT[,PRECISION]]",
        help="in place of configurations: precisions, of the checkpoint or of others, such as bf16 w4a8=OUT "
        "nearest=OUT_2,w4a8; the first is compared with",
    )  # fmt: skip
    add_clip_options(parser, PROTOCOL_WINDOWS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; a run that was cut goes on")
    parser.add_argument("--clips-at-once", type=int, default=64, metavar="N", help="side by side (default: 64)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on each device (default: 1)")
    parser.add_argument(
        "--closed-loop", type=int, default=0, metavar="SCENES", help="drive so many scenes with each (default: none)"
    )
    parser.add_argument(
        "--scenes-at-once", type=int, default=512, metavar="N",
        help="driven side by side; a run that was cut goes on behind those that are done (default: 512)",
    )  # fmt: skip
    parser.add_argument("--closed-loop-seconds", type=float, default=20.0, help="length of a drive (default: 20)")
    parser.add_argument(
        "--latency-clips", type=int, default=1, metavar="N",
        help="that the engines themselves answer; 0 leaves latencies out (default: 1)",
    )  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="no engine: put together what is in --out")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run every configuration and compare. Returns 1 where clips or windows ended in a problem."""
    names = chosen_configurations(args)
    if not args.report_only:
        _check(args)
        _measure(args, names)
    ablation = read_ablation(args.out, names)
    print(markdown(ablation))
    for path in write_ablation(ablation, args.out):
        print(f"wrote {path}")
    return 1 if any(summary.problems for summary in ablation.summaries.values()) else 0


def _check(args: argparse.Namespace) -> None:
    if args.checkpoint is None:
        raise InputError("a checkpoint is required, or --report-only")
    if args.precisions and args.configurations:
        raise InputError("--precisions or --configurations is required, found both")
    for name, least in (
        ("clips_at_once", 1),
        ("workers", 1),
        ("scenes_at_once", 1),
        ("latency_clips", 0),
        ("closed_loop", 0),
    ):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, found {getattr(args, name)}")


def _measure(args: argparse.Namespace, names: list[str]) -> None:
    """The engines one by one on few clips, then their functions over many at a time, then the drives."""
    own = {name: configured(args, name) for name in names}
    settings = {name: engine_settings(own[name], image_size(args)) for name in names}
    same = same_as(settings)
    held = HeldClips(clip_source(args, settings[names[0]].torch_device), args.latency_clips)
    loaded: dict[Hashable, LoadedModel | None] = {}
    for name in names:
        weights = weights_of(settings[name])
        timed = ResultFolder(args.out / LATENCY / name)
        # Weights are read once, and once more with an overlay or in another precision.
        loaded[weights] = answer_clips(own[name], timed, loaded.get(weights), held, only_prepare=not args.latency_clips)
        ResultFolder(args.out / name).prepare(timed.settings() | {SAME_AS: same[name]})
    loaded.clear()
    devices = devices_of(args.device) * args.workers
    cameras = held.camera_indices
    chosen = {name: replace(settings[name], cameras=cameras) for name in names if same[name] == name}
    source = partial(clip_source, _without_functions(args))
    folders = {name: (one, args.out / name) for name, one in chosen.items()}
    clips = clip_source(args, "cpu")
    count = len(clips) or sum(1 for _ in clips.clips())
    works = {name: LockstepWork(some, source, args.clips_at_once) for name, some in _works(folders, devices).items()}
    spread_each(works, range(count), devices, "open loop")
    if args.closed_loop:
        _drive(args, chosen, devices)


def _drive(args: argparse.Namespace, settings: dict[str, PlainSettings], devices: list[str]) -> None:
    """Drive scenes of the split that is named, or of the test split, by configurations that have not yet."""
    split = "test" if args.world is None else args.world.partition(":")[0]
    height, width = image_size(args)
    indices = range(args.closed_loop)
    run_settings = RunSettings(split, args.closed_loop_seconds, batch=args.scenes_at_once)
    described = {
        name: json.loads((args.out / name / "settings.json").read_text(encoding="utf-8"))
        | {"split": split, "scenes": len(indices), "seconds": args.closed_loop_seconds}
        for name in settings
    }
    todo = {n: s for n, s in settings.items() if read_drives(args.out / n / DRIVES, described[n]) is None}
    if not todo:
        return
    # Every drive has pictures of its own, so nothing is gained by doing configurations together.
    works = {
        n: ConfiguredDrives({n: s}, run_settings, (width, height), described, {n: args.out / n})
        for n, s in todo.items()
    }
    driven = spread_each(works, indices, devices, "closed loop")
    for name in todo:
        write_drives(args.out / name / DRIVES, described[name], [row for other, row in driven if other == name])
        shutil.rmtree(args.out / name / PARTS)


def _works(configurations: dict[str, T], devices: list[str]) -> dict[str, dict[str, T]]:
    """Which configurations are done together, by what they are called.

    Pictures are made once for what is done together, which is what counts on a CPU. On GPUs computing takes as long for
    a few clips as for many, so there are as many groups as leave two processes to each.
    """
    count = max(1, min(len(configurations), len(devices) // 2))
    if devices[0] == "cpu":
        count = 1
    names = [list(configurations)[first::count] for first in range(count)]
    return {"+".join(some): {name: configurations[name] for name in some} for some in names}


def _without_functions(args: argparse.Namespace) -> argparse.Namespace:
    """Options that can be sent to another process."""
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if not callable(value)})


def chosen_configurations(args: argparse.Namespace) -> list[str]:
    """Names in order.

    Raises:
        InputError: One was asked for whose files are not given, or a precision twice.
    """
    if args.precisions:
        names = [text.partition("=")[0] for text in args.precisions]
        if len(set(names)) < len(names) or not all(_NAME.fullmatch(name) for name in names):
            raise InputError(
                f"--precisions: different names of letters, digits and dashes are required, found {' '.join(names)}"
            )
        return names
    missing = {
        name: [o for o in options if getattr(args, o) is None and o not in _OPTIONAL.get(name, ())]
        for name, (options, _) in CONFIGURATIONS.items()
    }
    if args.configurations is None:
        return [name for name in CONFIGURATIONS if not missing[name]]
    for name in args.configurations:
        if missing[name] and not args.report_only:
            raise InputError(f"configuration {name!r} requires --{missing[name][0].replace('_', '-')}, found none")
    return list(args.configurations)


def configured(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The command line as it would be for one configuration."""
    if args.precisions:
        return argparse.Namespace(**(vars(args) | _precision(args, name)))
    options, changes = CONFIGURATIONS[name]
    given = {option: getattr(args, option) for option in options}
    return argparse.Namespace(**(vars(args) | _OFF | changes | given))


def _precision(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Checkpoint and precision of one of ``--precisions``."""
    text = next(text for text in args.precisions if text.partition("=")[0] == name)
    checkpoint, _, precision = text.partition("=")[2].partition(",")
    return {"checkpoint": checkpoint or args.checkpoint, "precision": precision or name}
