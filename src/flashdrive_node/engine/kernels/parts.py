"""Products whose sums are still apart, because K was split to occupy the device.

What reads such a product is one kernel in any case, and adds the parts up on its way: that spares a kernel between two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_parts(product: Tensor) -> bool:
    """Whether a product is float32 [parts, M, N], to be added up in order and rounded once, in place of [M, N]."""
    return product.ndim == 3


def summed(product: Tensor, dtype: torch.dtype) -> Tensor:
    """The product itself, [M, N] in `dtype`."""
    if not is_parts(product):
        return product
    total = product[0]
    for part in product[1:]:
        total = total + part
    return total.to(dtype)
