"""The choice of the next token under temperature and top-p, without sorting the vocabulary."""

from __future__ import annotations

from torch import Tensor

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.model.sampling import SamplingSettings, filter_logits


def draw(logits: Tensor, settings: SamplingSettings, noise: Tensor | None) -> Tensor:
    """Draw one token per row with given randomness: the winner of an exponential race of the probabilities.

    Where several tokens at the edge of the nucleus are equally likely, the Triton form keeps all of them and the
    reference as many as top-p needs; nothing else differs but rounding.

    Args:
        logits: [rows, vocabulary]; -inf for what may not be drawn.
        settings: How tokens are drawn.
        noise: Exponentially distributed, float32 [rows, vocabulary]; a greedy choice needs none.

    Returns:
        int64 [rows].

    Raises:
        ValueError: Noise is missing or of another shape.
    """
    if settings.greedy:
        return logits.argmax(dim=-1)
    if noise is None or noise.shape != logits.shape:
        found = None if noise is None else list(noise.shape)
        raise ValueError(f"sampling: noise of the logits' shape {list(logits.shape)} is required, found {found}")
    if uses_triton(logits) and settings.top_k is None and logits.is_contiguous() and noise.is_contiguous():
        from flashdrive_node.engine.kernels.triton_sampling import draw as run

        return run(logits, settings.temperature, settings.top_p, noise)
    return (filter_logits(logits.float(), settings).softmax(dim=-1) / noise).argmax(dim=-1)
