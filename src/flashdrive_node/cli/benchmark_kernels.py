"""``flashdrive benchmark-kernels``: the engine's own kernels beside PyTorch's, at the shapes of a release."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flashdrive_node.cli.benchmark import DIMENSIONS
from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.evaluation.kernel_benchmark import kernel_figure, kernel_json, kernel_markdown, measure_kernels
from flashdrive_node.evaluation.kernel_cases import Shapes, kernel_cases
from flashdrive_node.model.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--dims", choices=sorted(DIMENSIONS), default="10b", help="dimensions (default: 10b)")
    parser.add_argument("--device", default="cuda", help="torch device with Triton (default: cuda)")
    parser.add_argument("--repeats", type=int, default=20, help="passes of which the median is taken (default: 20)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write kernels.json, kernels.md and kernels.png")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("benchmark-kernels needs a CUDA device, found none")
    if not uses_triton(torch.empty(0, device=device, dtype=torch.bfloat16)):
        raise InputError(f"benchmark-kernels needs a device that the Triton kernels run on, found {device}")
    if args.repeats < 1:
        raise InputError(f"--repeats must be 1 or more, found {args.repeats}")
    cases = kernel_cases(DIMENSIONS[args.dims](), Shapes(), device, torch.bfloat16)
    times = measure_kernels(cases, device, args.repeats)
    table, name = kernel_markdown(times), torch.cuda.get_device_name(device)
    print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        conditions = {"device": name, "torch": torch.__version__, "dimensions": args.dims, "precision": "bfloat16"}
        (args.out / "kernels.json").write_text(kernel_json(times, conditions), encoding="utf-8")
        (args.out / "kernels.md").write_text(table + "\n", encoding="utf-8")
        (args.out / "kernels.png").write_bytes(kernel_figure(times, f"{name}, bfloat16, {args.dims} dimensions"))
        print(f"written to {args.out}")
    return 0
