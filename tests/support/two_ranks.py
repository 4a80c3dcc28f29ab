"""A step of the optimiser in two processes that share their gradients."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn

GRADIENTS = ([0.2, 0.0, -0.1], [0.2, 0.4, 0.3])
CLOCKS = (0.2, 0.6)


def steps_of_two_ranks(folder: Path) -> list[tuple[list[float], float, float]]:
    """Weights, norm of the gradient, and clock after one step, per rank."""
    multiprocessing.spawn(_rank, (folder,), nprocs=2)
    return [tuple(json.loads((folder / str(rank)).read_text())) for rank in range(2)]


def _rank(rank: int, folder: Path) -> None:
    from flashdrive_node.training.optimiser import Optimiser

    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    weight = nn.Parameter(torch.zeros(3))
    optimiser = Optimiser([("heads.bias", weight)], rate=1.0, decay=0.0)
    weight.grad = torch.tensor(GRADIENTS[rank])
    norm, clock = optimiser.step(CLOCKS[rank])
    (folder / str(rank)).write_text(json.dumps([weight.detach().tolist(), float(norm), float(clock)]))
    distributed.destroy_process_group()
