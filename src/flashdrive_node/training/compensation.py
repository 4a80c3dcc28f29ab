"""Rounding of a matrix column by column, each error made up for by the columns that are still to come.

The closed form of "optimal brain surgeon" in a fixed order, as in GPTQ (Frantar et al., arXiv 2210.17323): to round one
column to what a format can hold changes the layer's outputs, and where the inputs' channels vary together the columns
that remain can take back most of that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashdrive_node.model.errors import InputError

#: Columns between two updates of all that follow.
_BLOCK = 128
#: Rows of inputs whose products are taken at once.
_ROWS = 4096
#: Share of the mean second moment that is added to every channel's, so that rare channels stay near their values.
DAMPING = 0.01


def compensated(
    weight: Tensor,
    inputs: Tensor,
    rounded: Callable[[Tensor, int], Tensor],
    input_noise: float = 0.0,
    damping: float = DAMPING,
) -> Tensor:
    """Round a matrix so that its products with some inputs change little.

    Args:
        weight: Float32 [N, K].
        inputs: What it is multiplied with, [rows, K], finite.
        rounded: Takes values [N] and the number of their column; gives what the format holds in their place.
        input_noise: Size of the inputs' own rounding, relative to each of them, independent of all else.
        damping: See `DAMPING`.

    Returns:
        Float32 [N, K], every column a result of `rounded`.

    Raises:
        InputError: Inputs that are not finite, or no rows.
    """
    if not len(inputs) or not bool(torch.isfinite(inputs).all()):
        raise InputError("finite inputs, one row or more, are required, found none, inf or nan")
    factor, order = _inverse_factor(inputs.float(), input_noise, damping)
    # Columns in the order in which they are rounded, those with the largest inputs first.
    left, numbers = weight.float()[:, order], order.tolist()
    result = torch.empty_like(left)
    for first in range(0, len(numbers), _BLOCK):
        last = min(first + _BLOCK, len(numbers))
        block, rows = left[:, first:last].clone(), factor[first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            column = rounded(block[:, i], numbers[first + i])
            errors[:, i] = (block[:, i] - column) / rows[i, first + i]
            result[:, first + i] = column
            block[:, i + 1 :] -= errors[:, i, None] * rows[i, first + i + 1 : last]
        left[:, last:] -= errors @ rows[:, last:]
    return result[:, order.argsort()]


def fitted_to(weight: Tensor, inputs: Tensor, wanted: Tensor, damping: float = DAMPING) -> Tensor:
    """The matrix near another one whose products with some inputs are closest to what is wanted.

    Where inputs carry errors of their own, a matrix can make up for the part of them that it can foresee (asymmetric
    calibration, GPTAQ, Li et al., arXiv 2504.02692).

    Args:
        weight: Float32 [N, K].
        inputs: [rows, K], finite.
        wanted: What the products should be, [rows, N].
        damping: Share of the mean second moment that each weight is held to its value with.

    Returns:
        Float32 [N, K].
    """
    moment = _moment(inputs)
    own = moment.diagonal()
    own += damping * own.mean().clamp(min=torch.finfo(torch.float32).tiny)
    missing = torch.zeros(inputs.shape[1], len(weight), dtype=torch.float64, device=inputs.device)
    for x, y in zip(inputs.split(_ROWS), wanted.split(_ROWS), strict=True):
        missing.addmm_(x.double().T, (y - x @ weight.T).double(), alpha=1 / len(inputs))
    change = torch.cholesky_solve(missing, torch.linalg.cholesky(moment))
    return weight + change.T.float()


def _moment(inputs: Tensor) -> Tensor:
    """Mean products of channels, [K, K]; float64: the smallest of thousands of eigenvalues is far below the largest."""
    moment = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64, device=inputs.device)
    for part in inputs.split(_ROWS):
        moment.addmm_(part.double().T, part.double(), alpha=1 / len(inputs))
    return moment


def _inverse_factor(inputs: Tensor, input_noise: float, damping: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor [K, K] of the inverse second moment of the inputs, and the order of its channels."""
    moment = _moment(inputs)
    own = moment.diagonal()
    own += input_noise**2 * own + damping * own.mean().clamp(min=torch.finfo(torch.float32).tiny)
    order = own.argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment[order][:, order]))
    return torch.linalg.cholesky(inverse, upper=True).float(), order
