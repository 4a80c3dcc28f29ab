"""AdamW on float32 copies of bfloat16 weights, with their moving average, over any number of GPUs.

Networks compute in the type in which they will be used; what is small in an update is kept by the float32 copy. All
weights are one flat tensor, so an update is a handful of kernels and one all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

#: Of Adam.
_BETAS, _EPSILON = (0.9, 0.95), 1e-8
#: Gradients are scaled down to this norm.
_CLIP = 1.0
#: The learning rate rises over this many steps, and ends at this share of its peak.
_WARM_UP_STEPS, _FINAL_SHARE = 100, 0.02


class Optimiser:
    """Updates parameters in place."""

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, decay: float = 0.05, average: float = 0.998):
        """Take the parameters over.

        Args:
            parameters: On one device, of any floating type.
            rate: Peak learning rate.
            decay: Weight decay of matrices.
            average: Share of the moving average that is kept per step.
        """
        self.parameters: list[Tensor] = list(parameters)
        self.rate, self.decay, self.keep = rate, decay, average
        self.steps = 0
        device = self.parameters[0].device
        sizes = [p.numel() for p in self.parameters]
        with torch.no_grad():
            self.master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.average = self.master.clone()
        self._first, self._second = torch.zeros_like(self.master), torch.zeros_like(self.master)
        # The last element carries the clock, which all ranks must agree about.
        self._gradient = torch.zeros(len(self.master) + 1, device=device)
        self._matrix = torch.cat(
            [torch.full((n,), float(p.ndim > 1), device=device) for n, p in zip(sizes, self.parameters, strict=True)]
        )
        self._gradient_views = self._views(self._gradient[:-1])
        self._master_views = self._views(self.master)

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def step(self, clock: float) -> tuple[Tensor, Tensor]:
        """Apply the gradients that the parameters hold, and drop them.

        Args:
            clock: Share of the time that is over, by which the learning rate falls; averaged over the ranks.

        Returns:
            Norm of the gradient, and the clock of all ranks: scalars on the device.
        """
        torch._foreach_copy_(self._gradient_views, [self._grad(p) for p in self.parameters])
        self._gradient[-1] = clock
        if distributed.is_initialized():
            distributed.all_reduce(self._gradient)
            self._gradient /= distributed.get_world_size()
        shared = self._gradient[-1].clamp(0, 1)
        gradient = self._gradient[:-1]
        norm = gradient.norm()
        # A step that went wrong changes nothing.
        usable = norm.isfinite()
        gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(torch.where(usable, (_CLIP / (norm + 1e-6)).clamp(max=1.0), 0.0))
        self.steps += 1
        rise = min(1.0, self.steps / _WARM_UP_STEPS)
        fall = _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + torch.cos(torch.pi * shared))
        rate = self.rate * rise * fall
        self._first.lerp_(gradient, 1 - _BETAS[0])
        self._second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        scale = (self._second / (1 - _BETAS[1] ** self.steps)).sqrt_().add_(_EPSILON)
        update = (self._first / (1 - _BETAS[0] ** self.steps)).div_(scale)
        update.addcmul_(self._matrix, self.master, value=self.decay)
        self.master.sub_(update.mul_(rate))
        self.average.lerp_(self.master, 1 - min(self.keep, (1 + self.steps) / (10 + self.steps)))
        torch._foreach_copy_(self.parameters, self._master_views)
        for parameter in self.parameters:
            parameter.grad = None
        return norm, shared

    @staticmethod
    def _grad(parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the moving average into the parameters."""
        torch._foreach_copy_(self.parameters, self._views(self.average))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in the parameters for a while, then what is trained again."""
        self.use_average()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self._master_views)
