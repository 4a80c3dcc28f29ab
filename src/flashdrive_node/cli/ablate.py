"""``flashdrive ablate``: what each shortcut of the streaming engine costs in accuracy and gains in time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flashdrive_node.cli.clip_options import add_clip_options
from flashdrive_node.cli.engine_options import add_engine_options
from flashdrive_node.cli.evaluate import answer_clips
from flashdrive_node.evaluation.ablation import markdown, read_ablation, write_ablation
from flashdrive_node.evaluation.clip import PROTOCOL_WINDOWS
from flashdrive_node.evaluation.evaluation import ResultFolder, Shard
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel

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
#: What a configuration goes without where it is not given.
_OPTIONAL = {"all": ("overlay",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("checkpoint", nargs="?", help="checkpoint directory or Hugging Face id")
    parser.add_argument(
        "--configurations", nargs="+", choices=sorted(CONFIGURATIONS), metavar="NAME",
        help=f"of {', '.join(CONFIGURATIONS)}; the first is compared with (default: all whose files are given)",
    )  # fmt: skip
    add_clip_options(parser, PROTOCOL_WINDOWS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; a run that was cut goes on")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="only every N-th clip, from number I on")
    parser.add_argument("--report-only", action="store_true", help="no engine: put together what is in --out")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate every configuration and compare. Returns 1 where clips or windows ended in a problem."""
    names = chosen_configurations(args)
    if not args.report_only:
        loaded: dict[Path | None, LoadedModel | None] = {}
        for name in names:
            own = configured(args, name)
            # Weights are read once, and once more with an overlay.
            loaded[own.overlay] = answer_clips(own, ResultFolder(args.out / name), loaded.get(own.overlay))
        if Shard.parse(args.shard).of > 1:
            print(f"clips {args.shard} are done; --report-only puts all together")
            return 0
    ablation = read_ablation(args.out, names)
    print(markdown(ablation))
    for path in write_ablation(ablation, args.out):
        print(f"wrote {path}")
    return 1 if any(summary.problems for summary in ablation.summaries.values()) else 0


def chosen_configurations(args: argparse.Namespace) -> list[str]:
    """Names in order.

    Raises:
        InputError: One was asked for whose files are not given.
    """
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
    options, changes = CONFIGURATIONS[name]
    given = {option: getattr(args, option) for option in options}
    return argparse.Namespace(**(vars(args) | _OFF | changes | given))
