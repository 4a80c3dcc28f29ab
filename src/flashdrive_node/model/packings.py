"""How 4-bit integers lie in the words of public checkpoints: permutations of half bytes, undone here.

Half bytes are numbered from the lowest of a little-endian word upwards. N are a matrix's rows (outputs), K its columns.

- AWQ: int32 [rows, N / 8], every word eight neighbouring columns in the order `AWQ_ORDER`.
- int16 (llm-awq, and ParoQuant's research code): [N / 4, K], four rows interleaved in blocks of 64 columns, and the
  columns of each half of a block in an order that its kernel unpacks fast.
- Marlin with 8-bit activations (vLLM's ``awq_marlin_repack``): int32 [K / 16, 2 N], tiles of 32 x 32 in the order in
  which the threads of a warp feed them to the tensor cores. Scales and zero points are permuted to match.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.model.int4 import pack_bytes, unpack_bytes

#: Which of eight neighbouring values each half byte of an AWQ word holds, lowest first.
AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
#: The scale of every place of 32, and the zero point of every place of 64, in Marlin's order.
_MARLIN_SCALES = torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
_MARLIN_ZEROS = torch.arange(64).view(8, 8).T.flatten()


def half_bytes(words: Tensor) -> Tensor:
    """All half bytes of the words of a row: integers [rows, W] -> uint8 [rows, W * 2 * itemsize], each 0 to 15."""
    return unpack_bytes(words.contiguous().view(torch.uint8))


def pack_words(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, N], 0 to 15, to AWQ words int32 [rows, N / 8]."""
    eights = codes.unflatten(1, (-1, 8))[..., AWQ_ORDER.to(codes.device)]
    return pack_bytes(eights.flatten(1)).contiguous().view(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`: uint8 [rows, N]."""
    eights = half_bytes(words).unflatten(1, (-1, 8))
    return eights[..., AWQ_ORDER.argsort().to(words.device)].flatten(1)


def unpack_int16(words: Tensor) -> Tensor:
    """A matrix in the int16 packing: int16 [N / 4, K] -> codes uint8 [N, K]; K in blocks of 64."""
    fours, columns = words.shape
    # A block of 64 words: row of four, half, then the columns of a half as (b, c, a) in place of (a, b, c).
    stored = half_bytes(words).view(fours, columns // 64, 4, 2, 4, 2, 4)
    return stored.permute(0, 2, 1, 3, 6, 4, 5).reshape(4 * fours, columns)


def unpack_marlin(words: Tensor) -> Tensor:
    """A matrix in Marlin's tiles for 8-bit activations: int32 [K / 16, 2 N] -> codes uint8 [N, K]; both in whole 32."""
    columns, rows = 16 * words.shape[0], words.shape[1] // 2
    # Of a tile: thread (row of eight, four of columns), warp (half of the rows, eight of them), and in a word columns
    # of the lower and of the upper half in turn.
    stored = half_bytes(words).view(columns // 32, rows // 32, 8, 4, 2, 2, 4, 2)
    return stored.permute(1, 4, 5, 2, 0, 7, 3, 6).reshape(rows, columns)


def unpack_marlin_scales(scales: Tensor) -> Tensor:
    """Scales [groups, N] out of Marlin's order; N in whole 32."""
    return _undo(scales, _MARLIN_SCALES)


def unpack_marlin_zeros(words: Tensor) -> Tensor:
    """Zero points: int32 [groups, N / 8] -> uint8 [groups, N]; N in whole 64."""
    return _undo(half_bytes(words), _MARLIN_ZEROS)


def _undo(values: Tensor, order: Tensor) -> Tensor:
    """Place j of every len(order) holds value order[j]; give them their own places again."""
    parts = values.unflatten(1, (-1, len(order)))
    return parts[..., order.argsort().to(values.device)].flatten(1)
