"""``flashdrive benchmark-node``: what the node itself costs around the engine, measured over real DDS."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time (default: 20)")
    parser.add_argument("--rate", type=float, default=10.0, metavar="HZ", help="camera rate (default: 10)")
    parser.add_argument("--width", type=int, default=1920, help="columns of the pictures (default: 1920)")
    parser.add_argument("--height", type=int, default=1080, help="rows of the pictures (default: 1080)")
    parser.add_argument("--engine-latency", type=float, default=0.03, metavar="S", help="of the fake engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure. Returns 0; 1 where no window came through; 2 where the node could not be started."""
    from flashdrive_node.ros.overhead import BurstOptions, measure
    from flashdrive_node.ros.session import SessionError

    with tempfile.TemporaryDirectory(prefix="flashdrive_benchmark_") as folder:
        options = BurstOptions(args.seconds, args.rate, args.width, args.height, args.engine_latency)
        try:
            result = measure(options, Path(folder))
        except SessionError as error:
            print(f"flashdrive benchmark-node: {error}", file=sys.stderr)
            return 2
    print("\n".join(result.table()))
    if args.json is not None:
        args.json.write_text(result.to_json(), encoding="utf-8")
    return 0 if result.windows else 1
