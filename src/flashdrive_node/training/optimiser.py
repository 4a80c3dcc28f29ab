"""Updates of float32 copies of bfloat16 weights, with their moving average, over any number of GPUs.

Matrices inside the networks are updated by orthogonalised momentum (Muon, arXiv 2502.16982), which needs about half as
many steps as Adam; everything else (embeddings, norms, biases, read-outs) by AdamW. All weights are one flat tensor, so
an update is a few dozen kernels and one all-reduce.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

#: Of Adam.
_BETAS, _EPSILON = (0.9, 0.95), 1e-8
#: Of Muon: momentum, and the size of an update relative to Adam's at the same rate.
_MOMENTUM, _MATRIX_SCALE = 0.95, 0.2
#: Coefficients and number of Newton-Schulz steps, which bring singular values close to one.
_NEWTON_SCHULZ, _NEWTON_SCHULZ_STEPS = (3.4445, -4.7750, 2.0315), 5
#: Parts of the names of what stands at the networks' ends, which Adam updates whatever its shape.
_ENDS = ("embed", "lm_head", "action_in_proj", "action_out_proj", "heads.")
#: Gradients are scaled down to this norm.
_CLIP = 1.0
#: The learning rate rises over this many steps unless others are asked for, and ends at this share of its peak.
_WARM_UP_STEPS, _FINAL_SHARE = 100, 0.02


class Optimiser:
    """Updates parameters in place."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        rate: float,
        decay: float = 0.05,
        average: float = 0.998,
        matrix_rate: float | None = 4e-3,
        warm_up: int = _WARM_UP_STEPS,
    ):
        """Take the parameters over.

        Args:
            parameters: With their names, on one device, of any floating type; names of auxiliary read-outs begin with
                "heads.".
            rate: Peak learning rate of Adam.
            decay: Weight decay of matrices.
            average: Share of the moving average that is kept per step.
            matrix_rate: Peak learning rate of the matrices inside the networks. None updates them by Adam as well,
                which follows noise less where gradients are mostly that.
            warm_up: Steps over which the learning rates rise.
        """
        named = list(parameters)
        self.parameters: list[Tensor] = [p for _, p in named]
        self.rate, self.decay, self.keep, self.warm_up = rate, decay, average, warm_up
        self.steps = 0
        device = self.parameters[0].device
        with torch.no_grad():
            self.master = torch.cat([p.detach().float().flatten() for p in self.parameters])
        self.average = self.master.clone()
        self._first, self._second = torch.zeros_like(self.master), torch.zeros_like(self.master)
        # The last element carries the clock, which all ranks must agree about.
        self._gradient = torch.zeros(len(self.master) + 1, device=device)
        self._update = torch.zeros_like(self.master)
        #: Indices of the matrices inside the networks, those of one shape together.
        self._groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (name, parameter) in enumerate(named):
            if matrix_rate is not None and parameter.ndim == 2 and not any(end in name for end in _ENDS):
                self._groups[tuple(parameter.shape)].append(i)
        inside = {i for group in self._groups.values() for i in group}
        #: Per weight: learning rate relative to `rate`, momentum's share of the old, and whether it decays.
        relative = 1.0 if matrix_rate is None else matrix_rate / rate
        self._relative = self._per_weight([relative if i in inside else 1.0 for i in range(len(named))])
        self._old = self._per_weight([_MOMENTUM if i in inside else _BETAS[0] for i in range(len(named))])
        self._decays = self._per_weight([float(p.ndim > 1) for p in self.parameters])
        self._gradient_views = self._views(self._gradient[:-1])
        self._master_views = self._views(self.master)
        self._momentum_views, self._update_views = self._views(self._first), self._views(self._update)

    def _per_weight(self, values: Sequence[float]) -> Tensor:
        """One value per parameter as one per weight."""
        device = self.parameters[0].device
        counts = torch.tensor([p.numel() for p in self.parameters], device=device)
        return torch.tensor(values, device=device).repeat_interleave(counts)

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
        rise = min(1.0, self.steps / self.warm_up)
        fall = _FINAL_SHARE + (1 - _FINAL_SHARE) * 0.5 * (1 + torch.cos(torch.pi * shared))
        rate = self.rate * rise * fall
        self._first.mul_(self._old).add_(gradient * (1 - self._old))
        self._second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        scale = (self._second / (1 - _BETAS[1] ** self.steps)).sqrt_().add_(_EPSILON)
        torch.div(self._first / (1 - _BETAS[0] ** self.steps), scale, out=self._update)
        self._orthogonalise()
        update = self._update.addcmul_(self._decays, self.master, value=self.decay).mul_(self._relative)
        self.master.sub_(update.mul_(rate))
        self.average.lerp_(self.master, 1 - min(self.keep, (1 + self.steps) / (10 + self.steps)))
        torch._foreach_copy_(self.parameters, self._master_views)
        for parameter in self.parameters:
            parameter.grad = None
        return norm, shared

    def _orthogonalise(self) -> None:
        """Replace Adam's update of the matrices inside the networks by theirs."""
        for shape, members in self._groups.items():
            # Nesterov's look ahead: the momentum after one more gradient like this one.
            ahead = [_MOMENTUM * self._momentum_views[i] + (1 - _MOMENTUM) * self._gradient_views[i] for i in members]
            turned = orthogonal(torch.stack(ahead)) * (_MATRIX_SCALE * max(shape) ** 0.5)
            torch._foreach_copy_([self._update_views[i] for i in members], list(turned.unbind()))

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


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with their singular values brought close to one, in bfloat16 on a GPU."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)
