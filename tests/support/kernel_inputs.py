"""Inputs of the kernels' tests, and where these run: on a GPU in bfloat16, else in Triton's interpreter.

The interpreter multiplies bfloat16 matrices as integers (triton 3.6 to 3.9), so float16 stands in for it on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
#: Distance of neighbouring numbers just above 1.
ULP = torch.finfo(DTYPE).eps


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal random numbers on the tests' device."""
    return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)


def seeded(seed: int) -> torch.Generator:
    """A source of randomness on the CPU, so that every device is tested on the same numbers."""
    return torch.Generator().manual_seed(seed)


def integers(values: object) -> Tensor:
    """A tensor of int64 on the tests' device."""
    return torch.tensor(values, device=DEVICE)


def assert_close(found: Tensor, expected: Tensor, ulps: float) -> None:
    """Compare with a reference in float64, in units of the last place of the larger of 1 and the value expected."""
    assert found.shape == expected.shape
    distance = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    worst = float(distance.max()) / ULP if distance.numel() else 0.0
    assert worst <= ulps, f"off by {worst:.2f} ulp, {ulps} allowed"  # NaN does not pass
