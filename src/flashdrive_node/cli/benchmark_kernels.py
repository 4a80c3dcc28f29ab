"""``flashdrive benchmark-kernels``: the engine's own kernels beside PyTorch's, at the shapes of a release."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from flashdrive_node.cli.benchmark import DIMENSIONS
from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.evaluation.format_benchmark import (
    best_markdown,
    format_figure,
    format_json,
    format_markdown,
    measure_formats,
)
from flashdrive_node.evaluation.kernel_benchmark import kernel_figure, kernel_json, kernel_markdown, measure_kernels
from flashdrive_node.evaluation.kernel_cases import Shapes, kernel_cases
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--dims", choices=sorted(DIMENSIONS), default="10b", help="dimensions (default: 10b)")
    parser.add_argument("--device", default="cuda", help="torch device with Triton (default: cuda)")
    parser.add_argument("--repeats", type=int, default=20, help="passes of which the median is taken (default: 20)")
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=TABLES,
        default=["kernels"],
        help="kernels: ours beside PyTorch's; formats: products in bf16, fp8, int8 and 4 bits, with those of "
        "humming-kernels where it is installed; tilings: of those in bf16 and in 4 bits, and of attention "
        "(default: kernels)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write TABLE.json, TABLE.md and a picture of each")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("benchmark-kernels needs a CUDA device, found none")
    if not uses_triton(torch.empty(0, device=device, dtype=torch.bfloat16)):
        raise InputError(f"benchmark-kernels needs a device that the Triton kernels run on, found {device}")
    if args.repeats < 1:
        raise InputError(f"--repeats must be 1 or more, found {args.repeats}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    conditions = {"device": name, "torch": torch.__version__, "dimensions": args.dims, "precision": "bfloat16"}
    config, title = DIMENSIONS[args.dims](), f"{name}, {args.dims} dimensions"
    for table in dict.fromkeys(args.tables):
        text, content, picture = TABLES[table](config, device, args.repeats, conditions, title)
        print(text)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{table}.json").write_text(content, encoding="utf-8")
            (args.out / f"{table}.md").write_text(text + "\n", encoding="utf-8")
            if picture:
                (args.out / f"{table}.png").write_bytes(picture)
            print(f"written to {args.out}")
    return 0


class _Table(NamedTuple):
    """A table as text and as JSON, and perhaps as a picture."""

    text: str
    content: str
    picture: bytes | None


def _kernels(
    config: AlpamayoConfig, device: torch.device, repeats: int, conditions: dict[str, str], title: str
) -> _Table:
    times = measure_kernels(kernel_cases(config, Shapes(), device, torch.bfloat16), device, repeats)
    return _Table(kernel_markdown(times), kernel_json(times, conditions), kernel_figure(times, f"{title}, bfloat16"))


def _formats(
    config: AlpamayoConfig, device: torch.device, repeats: int, conditions: dict[str, str], title: str
) -> _Table:
    from flashdrive_node.evaluation.format_cases import FORMATS, format_cases  # needs the triton package
    from flashdrive_node.evaluation.humming_cases import HUMMING, Humming

    humming = Humming()
    times = measure_formats(format_cases(config, device, torch.bfloat16, humming), device, repeats)
    columns = [*FORMATS, *(name for name in HUMMING if any(name in t.us for t in times))]
    text = "\n\n".join((format_markdown(times, columns), *humming.notes()))
    content = format_json(times, conditions | {"humming-kernels": "; ".join(humming.notes())})
    return _Table(text, content, format_figure(times, columns, title))


def _tilings(
    config: AlpamayoConfig, device: torch.device, repeats: int, conditions: dict[str, str], title: str
) -> _Table:
    from flashdrive_node.evaluation.format_cases import tiling_cases  # needs the triton package
    from flashdrive_node.evaluation.kernel_tilings import bf16_tiling_cases

    four_bits = tiling_cases(config, device, torch.bfloat16)
    times = measure_formats(
        chain(bf16_tiling_cases(config, Shapes(), device, torch.bfloat16), four_bits), device, repeats
    )
    return _Table(best_markdown(times), format_json(times, conditions), None)


TABLES = {"kernels": _kernels, "formats": _formats, "tilings": _tilings}
