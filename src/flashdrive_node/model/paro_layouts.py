"""How files hold ParoQuant's 4-bit layers, and the way from each layout to `ParoWeight`.

A layer NAME [N, K] with groups of 128 along K and R rounds of rotations is, in the generic layout (z-lab/paroquant):
NAME.theta float16 [R, K/2], NAME.pairs int16 [R, K], NAME.channel_scales float16 [1, K], and as AWQ packs them
NAME.qweight int32 [K, N/8], NAME.qzeros int32 [K/128, N/8], NAME.scales float16 [K/128, N].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.model.int4 import Int4Weight, pack_bytes, unpack_bytes
from flashdrive_node.model.paroquant import ParoWeight

#: Of every public checkpoint.
GROUP_SIZE, ROUNDS = 128, 8
#: Which of eight neighbouring rows each half byte of an AWQ word holds, lowest first.
_AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


class Stored(NamedTuple):
    """A tensor as a file has it."""

    #: Name of its type in a header.
    dtype: str
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """One way to store layers."""

    name: str
    #: What stands behind a layer's name, of the tensors that make up an N x K layer.
    tensors: Callable[[int, int], dict[str, Stored]]
    #: From those tensors, by the same names.
    read: Callable[[Mapping[str, Tensor]], ParoWeight]


def generic_tensors(rows: int, columns: int) -> dict[str, Stored]:
    """The generic layout's tensors."""
    groups = columns // GROUP_SIZE
    return {
        "theta": Stored("F16", (ROUNDS, columns // 2)),
        "pairs": Stored("I16", (ROUNDS, columns)),
        "channel_scales": Stored("F16", (1, columns)),
        "qweight": Stored("I32", (columns, rows // 8)),
        "qzeros": Stored("I32", (groups, rows // 8)),
        "scales": Stored("F16", (groups, rows)),
    }


def read_generic(tensors: Mapping[str, Tensor]) -> ParoWeight:
    """From the generic layout."""
    matrix = Int4Weight(
        codes=pack_bytes(unpack_words(tensors["qweight"]).T.contiguous()),
        scales=tensors["scales"].T.contiguous(),
        zeros=unpack_words(tensors["qzeros"]).T.contiguous(),
    )
    return ParoWeight(tensors["pairs"], tensors["theta"], tensors["channel_scales"].flatten(), matrix)


def write_generic(weight: ParoWeight) -> dict[str, Tensor]:
    """To the generic layout."""
    return {
        "theta": weight.angles.half(),
        "pairs": weight.pairs.to(torch.int16),
        "channel_scales": weight.channel_scales.half()[None],
        "qweight": pack_words(unpack_bytes(weight.matrix.codes).T),
        "qzeros": pack_words(weight.matrix.zeros.T),
        "scales": weight.matrix.scales.T.contiguous(),
    }


def pack_words(codes: Tensor) -> Tensor:
    """Codes uint8 [rows, N], 0 to 15, to AWQ words int32 [rows, N / 8]."""
    places = torch.arange(0, 32, 4, device=codes.device)
    eights = codes.long().unflatten(1, (-1, 8))[..., _AWQ_ORDER.to(codes.device)]
    return (eights << places).sum(dim=-1).to(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`: uint8 [rows, N]."""
    places = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    halves = (words[..., None] >> places & 15).to(torch.uint8)
    return halves[..., _AWQ_ORDER.argsort().to(words.device)].flatten(1)


#: Layouts by what distinguishes their names.
GENERIC = Layout("generic (paroquant)", generic_tensors, read_generic)
LAYOUTS = (GENERIC,)
