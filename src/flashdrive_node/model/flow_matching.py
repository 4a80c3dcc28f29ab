"""Euler integration of the action flow: noise at t = 0, action at t = 1, in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Velocity of the flow at (x, t): x float32 [..., 2], t a float32 scalar.
Velocity = Callable[[Tensor, Tensor], Tensor]


def integrate(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Follow the flow in equal steps.

    Args:
        velocity: The network; called `steps` times, at t = 0, 1 / steps, ...
        noise: Starting point, float32, already scaled by the noise temperature.
        steps: Number of steps.

    Returns:
        The action, of noise's shape.
    """
    times = torch.linspace(0.0, 1.0, steps + 1, device=noise.device)
    x = noise
    for i in range(steps):
        x = x + (times[i + 1] - times[i]) * velocity(x, times[i])
    return x


def guided(with_condition: Velocity, without_condition: Velocity, weight: float | Tensor) -> Velocity:
    """Classifier-free guidance: ``(1 - w) v_without + w v_with`` (Guided Flows, arXiv 2311.13443, eq. 6)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (1 - weight) * without_condition(x, t) + weight * with_condition(x, t)

    return velocity
