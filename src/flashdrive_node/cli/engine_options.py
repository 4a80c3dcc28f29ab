"""Options that choose an engine and its settings, the same in every command that steps one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashdrive_node.bundled import BUNDLED, bundled_drafter, bundled_overlay
from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.sampling import SamplingSettings

#: Options of the streaming engine, which the plain one does not take.
_STREAMING = (
    *("stream_mode", "refresh_every", "refresh_views", "flow_schedule"),
    *("drafter", "draft_confidence", "shared_text", "eager"),
)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=("plain", "streaming"), default="plain", help="default: plain")
    add_stream_options(group)
    group.add_argument("--drafter", type=Path, metavar="DIR", help="streaming: directory of a drafter, or 'bundled'")
    group.add_argument(
        "--draft-confidence", type=float, metavar="P", help="streaming: check as many guesses as it is this sure of"
    )
    group.add_argument("--shared-text", action="store_true", help="streaming: one text for all samples")
    group.add_argument("--eager", action="store_true", help="streaming: stages are not captured as graphs on a GPU")
    group.add_argument("--flow-steps", type=int, metavar="N", help="flow steps (default: the checkpoint's)")
    group.add_argument("--samples", type=int, default=6, help="trajectories per window (default: 6)")
    group.add_argument("--temperature", type=float, default=0.6, help="of the reasoning; 0 is greedy (default: 0.6)")
    group.add_argument("--top-p", type=float, default=0.98, help="nucleus of the sampling (default: 0.98)")
    group.add_argument("--max-generation-length", type=int, default=128, metavar="N", help="longest reasoning, tokens")
    group.add_argument("--seed", type=int, default=0, help="of texts and noise (default: 0)")
    group.add_argument("--device", default="auto", help="torch device (default: a GPU where there is one)")
    group.add_argument("--precision", default="auto", help="auto, float32, bfloat16, a preset or STAGE=FORMAT,...")


def add_stream_options(group: argparse._ArgumentGroup) -> None:
    """Declare what changes the streaming engine's answers."""
    group.add_argument(
        "--stream-mode", choices=("full", "features", "kv"), help="streaming: what is kept (default: features)"
    )
    group.add_argument("--refresh-every", type=int, metavar="N", help="kv: all images anew every N windows")
    group.add_argument("--refresh-views", action="store_true", help="kv: one camera's images anew in every window")
    group.add_argument("--flow-schedule", metavar="TEXT", help="streaming: flow steps to evaluate, such as 8:0,1,2,7")
    group.add_argument(
        "--overlay", type=Path, metavar="PATH", help="fine-tuned expert to put over the checkpoint's, or 'bundled'"
    )


def stream_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `StreamingSettings` that `add_stream_options` declares.

    Raises:
        InputError: Values that are out of range.
    """
    return {
        "stream": StreamSettings(args.stream_mode or "features", args.refresh_every or 0, args.refresh_views),
        "schedule": FlowSchedule.parse(args.flow_schedule) if args.flow_schedule else None,
    }


def overlay_of(args: argparse.Namespace) -> Path | None:
    """The overlay that is named, which may be the bundled one.

    Raises:
        InputError: The package has none.
    """
    return _found(args.overlay, bundled_overlay, "--overlay")


def _found(given: Path | None, bundled: Callable[[], Path | None], option: str) -> Path | None:
    if given is None or str(given) != BUNDLED:
        return given
    if (path := bundled()) is None:
        raise InputError(f"{option}: a path is required, found {BUNDLED!r}, which this package does not have")
    return path


def refuse_without_streaming(args: argparse.Namespace) -> None:
    """Options of the streaming engine are for it alone.

    Raises:
        InputError: Some were given.
    """
    if given := [f"--{name.replace('_', '-')}" for name in _STREAMING if vars(args).get(name)]:
        raise InputError(f"{', '.join(given)}: --engine streaming is required, found {args.engine}")


def engine_settings(args: argparse.Namespace, image_size: tuple[int, int]) -> PlainSettings:
    """Settings that the options ask for.

    Args:
        args: Parsed; also has `checkpoint`.
        image_size: Height and width of the frames, pixels, for warming up.

    Raises:
        InputError: Options that do not go together, or values that are out of range.
    """
    common: dict[str, Any] = {
        "checkpoint": str(args.checkpoint),
        "overlay": overlay_of(args),
        "device": args.device,
        "precision": args.precision,
        "samples": args.samples,
        "sampling": SamplingSettings(args.temperature, args.top_p, max_length=args.max_generation_length),
        "flow_steps": args.flow_steps,
        "seed": args.seed,
        "image_size": image_size,
    }
    if args.engine == "plain":
        refuse_without_streaming(args)
        return PlainSettings(**common)
    return StreamingSettings(
        drafter=_found(args.drafter, bundled_drafter, "--drafter"),
        draft_confidence=args.draft_confidence or 0.0,
        shared_text=args.shared_text,
        graphs=not args.eager,
        **stream_options(args),
        **common,
    )


def make_engine(settings: PlainSettings) -> PlainEngine:
    """The engine that the settings are of."""
    return StreamingEngine(settings) if isinstance(settings, StreamingSettings) else PlainEngine(settings)


def described(args: argparse.Namespace) -> dict[str, Any]:
    """What the answers depend on, by option, for comparing two runs and for reports."""
    names = ["engine", "samples", "temperature", "top_p", "max_generation_length", "flow_steps", "seed", "overlay"]
    names += ["precision", *(_STREAMING if args.engine == "streaming" else ())]
    values = {name: getattr(args, name) for name in names}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items() if value}
