"""``flashdrive parity``: compare our networks with a recording of the reference implementation."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from flashdrive_node.evaluation.parity import STAGES, CaseResult, StageResult, run_case
from flashdrive_node.evaluation.recording import load_recording
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import DTYPES, load_alpamayo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument(
        "directory", type=Path, help="recording: checkpoint/, inputs.safetensors, cases/, manifest.json"
    )
    parser.add_argument("--dump", type=Path, metavar="OUT", help="write OUT/NAME.safetensors with our own values")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="precision (default: float32)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--case", action="append", metavar="NAME", help="run only this case; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 where every case is within bounds, 1 otherwise."""
    recording = load_recording(args.directory)
    cases = recording.cases
    if args.case:
        unknown = set(args.case) - {c.name for c in cases}
        if unknown:
            raise InputError(f"no such case: {sorted(unknown)}; the recording has {[c.name for c in cases]}")
        cases = tuple(c for c in cases if c.name in args.case)
    results = []
    with _threads(recording.threads):
        loaded = load_alpamayo(
            recording.checkpoint,
            args.device,
            DTYPES[args.dtype],
            constants=recording.constants,  # type: ignore[arg-type]
        )
        for case in tqdm(cases, desc="cases", unit="case"):
            result = run_case(loaded, case)
            if args.dump:
                args.dump.mkdir(parents=True, exist_ok=True)
                save_file(result.found, args.dump / f"{case.name}.safetensors")
            # The recorded tensors of a finished case are needed no more; a large vocabulary's logits take gigabytes.
            results.append(dataclasses.replace(result, found={}, case=dataclasses.replace(case, expected=None)))
    exact_only = args.dtype != "float32"
    print(table(results, exact_only))
    failed = [r.case.name for r in results if not r.passed(exact_only)]
    if exact_only:
        print(f"{args.dtype}: prompt, history and pixels must be identical; other errors are shown, not judged.")
    print(
        f"{len(results) - len(failed)} of {len(results)} cases within bounds"
        + (f"; failed: {failed}" if failed else "")
    )
    return 1 if failed else 0


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads on the CPU, None as many as there are: how a sum is split among threads changes its rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(results: list[CaseResult], exact_only: bool = False) -> str:
    """Case x stage: largest error relative to the largest recorded value, "=" where integers are identical."""
    stages = [name for name, _, _ in STAGES] + ["unknown"]
    stages = [s for s in stages if any(r.stage == s for result in results for r in result.stages)]
    rows = [["case", *stages, "text"]]
    bounds = {name: bound for name, _, bound in STAGES}
    rows.append(["bound", *("=" if bounds.get(s) is None else f"{bounds[s]:.0e}" for s in stages), "="])
    for result in results:
        by_stage = {s.stage: s for s in result.stages}
        cells = [_cell(by_stage.get(s), judged=not exact_only) for s in stages]
        text = "-" if result.case.expected_text is None else "=" if result.text_equal else "DIFFERS"
        rows.append([result.case.name, *cells, text])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"  {result.case.name}: {s.stage} error {s.error:.3g} in {s.worst}, bound {s.bound or 'identical'}"
        for result in results
        for s in result.stages
        if not s.passed and not exact_only
    ]
    return "\n".join([*lines, *(["out of bounds:", *notes] if notes else [])])


def _cell(result: StageResult | None, judged: bool) -> str:
    if result is None:
        return "-"
    mark = "!" if judged and not result.passed else ""
    if result.bound is None:
        return "=" if result.passed else f"differs{mark}"
    return f"{result.error:.1e}{mark}"
