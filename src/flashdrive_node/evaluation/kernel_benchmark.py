"""Times of the engine's kernels beside PyTorch's own: as in the engine, all calls of a pass in one graph."""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import matplotlib
import torch
from tqdm import tqdm

from flashdrive_node.evaluation.kernel_cases import KernelCase


@dataclass(frozen=True)
class KernelTime:
    """One kernel at one shape, all layers of a pass together."""

    name: str
    torch_ms: float
    own_ms: float
    #: Of the own kernel: bytes that no implementation avoids, per second.
    gigabytes_per_s: float


def measure_kernels(cases: Iterable[KernelCase], device: torch.device, repeats: int = 20) -> list[KernelTime]:
    """Time every case.

    Args:
        cases: Of `kernel_cases` on this device.
        device: On a CPU calls are timed by the host's clock, one after the other.
        repeats: Passes of which the median is taken.
    """
    times = []
    with torch.inference_mode():
        for case in tqdm(cases, desc="kernels", unit="case"):
            torch_ms, own_ms = (pass_ms(calls, device, repeats) for calls in (case.torch, case.own))
            times.append(KernelTime(case.name, torch_ms, own_ms, case.bytes / own_ms / 1e6))
    return times


def pass_ms(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> float:
    """Median time of all calls, in milliseconds."""

    def all_calls() -> None:
        for call in calls:
            call()

    all_calls()  # compiles and allocates
    if device.type != "cuda":
        return statistics.median(_host_ms(all_calls) for _ in range(repeats))
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    graph.replay()
    return statistics.median(_device_ms(graph.replay) for _ in range(repeats))


def _host_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _device_ms(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def kernel_markdown(times: Sequence[KernelTime]) -> str:
    """A table, one line per case."""
    lines = ["| kernel | PyTorch, ms | own, ms | ratio | own, GB/s |", "|---|---|---|---|---|"]
    for t in times:
        ratio, rate = t.torch_ms / t.own_ms, t.gigabytes_per_s
        lines.append(f"| {t.name} | {t.torch_ms:.3f} | {t.own_ms:.3f} | {ratio:.1f} | {rate:,.0f} |")
    return "\n".join(lines)


def kernel_json(times: Sequence[KernelTime], conditions: dict[str, str]) -> str:
    """Times with what they were measured on."""
    return json.dumps({"conditions": conditions, "kernels": [asdict(t) for t in times]}, indent=1)


def kernel_figure(times: Sequence[KernelTime], title: str) -> bytes:
    """Bars of both on a logarithmic axis, as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 0.5 * len(times) + 1.4), layout="constrained")
    rows = range(len(times))
    axis.barh([r - 0.19 for r in rows], [t.torch_ms for t in times], 0.38, color="#9aa5b1", label="PyTorch")
    axis.barh([r + 0.19 for r in rows], [t.own_ms for t in times], 0.38, color="#1f5a92", label="own")
    for row, t in enumerate(times):
        axis.annotate(f" {t.torch_ms / t.own_ms:.1f}x", (max(t.torch_ms, t.own_ms), row), va="center", fontsize=11)
    axis.set_yticks(list(rows), [t.name for t in times], fontsize=11)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.set_xlabel("milliseconds per pass through all layers, median", fontsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=11, frameon=False, loc="lower right")
    axis.set_title(title, fontsize=12, loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()
