"""How files hold ParoQuant's 4-bit layers, and the way from each layout to `ParoWeight`.

A layer NAME [N, K] with groups of 128 along K and R rounds of rotations is, in every layout, NAME.theta float16
[R, K/2], NAME.pairs int16 [R, K] and NAME.channel_scales float16 [1, K], and for the matrix itself:

- generic (z-lab/paroquant): NAME.qweight int32 [K, N/8], NAME.qzeros int32 [K/128, N/8], NAME.scales float16
  [K/128, N], words as AWQ packs them;
- int16 (research code): NAME.qweight int16 [N/4, K], NAME.scales and NAME.scaled_zeros float16 [groups, N], groups
  filled up to a multiple of eight, ``scaled_zeros = -scale * zero``;
- Marlin (the ``-PARO`` checkpoints of FlashDrive): NAME.qweight int32 [K/16, 2N] in vLLM's tiles for 8-bit
  activations, NAME.qzeros int32 [K/128, N/8], NAME.scales whole numbers of 16 bits in a float16 tensor, to be
  multiplied by NAME.input_global_scale.

The names may be nested (NAME.rotation.theta, NAME.qlinear.qweight) and wrapped (NAME.rotate_linear.rotation.theta).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.model.int4 import LEVELS, Int4Weight, pack_bytes, unpack_bytes
from flashdrive_node.model.packings import (
    pack_words,
    unpack_int16,
    unpack_marlin,
    unpack_marlin_scales,
    unpack_marlin_zeros,
    unpack_words,
)
from flashdrive_node.model.paroquant import ParoWeight

#: Of every public checkpoint.
GROUP_SIZE, ROUNDS = 128, 8


class Stored(NamedTuple):
    """A tensor as a file has it."""

    #: Name of its type in a header.
    dtype: str
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """One way to store the matrix of a layer."""

    name: str
    #: The tensors that make up an N x K matrix, by the last part of their names.
    tensors: Callable[[int, int], dict[str, Stored]]
    #: From those tensors and `ROTATION`'s, by the same names.
    read: Callable[[Mapping[str, Tensor]], ParoWeight]
    #: What N and K must be multiples of.
    multiples: tuple[int, int]


class Naming(NamedTuple):
    """What stands between a layer's name and that of a tensor."""

    rotation: str
    matrix: str

    def of(self, tensor: str) -> str:
        """All that stands behind the layer's name and a dot."""
        return (self.rotation if tensor in ROTATION else self.matrix) + tensor


FLAT = Naming("", "")
NAMINGS = (FLAT, Naming("rotation.", "qlinear."), Naming("rotate_linear.rotation.", "rotate_linear.qlinear."))
#: Tensors of a layer's rotation, whatever the layout of its matrix.
ROTATION = ("theta", "pairs", "channel_scales")
#: What vLLM's kernels keep beside a matrix, and nobody else needs; of any shape.
SCRATCH = ("workspace", "g_idx", "g_idx_sort_indices")


def rotation_tensors(columns: int) -> dict[str, Stored]:
    """The tensors of `ROTATION`."""
    return {
        "theta": Stored("F16", (ROUNDS, columns // 2)),
        "pairs": Stored("I16", (ROUNDS, columns)),
        "channel_scales": Stored("F16", (1, columns)),
    }


def _generic_tensors(rows: int, columns: int) -> dict[str, Stored]:
    groups = columns // GROUP_SIZE
    return {
        "qweight": Stored("I32", (columns, rows // 8)),
        "qzeros": Stored("I32", (groups, rows // 8)),
        "scales": Stored("F16", (groups, rows)),
    }


def read_generic(tensors: Mapping[str, Tensor]) -> ParoWeight:
    """From the generic layout."""
    codes = unpack_words(tensors["qweight"]).T
    return _weight(tensors, codes, tensors["scales"], unpack_words(tensors["qzeros"]))


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


def _int16_tensors(rows: int, columns: int) -> dict[str, Stored]:
    groups = -(-columns // GROUP_SIZE // 8) * 8
    return {
        "qweight": Stored("I16", (rows // 4, columns)),
        "scales": Stored("F16", (groups, rows)),
        "scaled_zeros": Stored("F16", (groups, rows)),
    }


def _read_int16(tensors: Mapping[str, Tensor]) -> ParoWeight:
    groups = tensors["qweight"].shape[1] // GROUP_SIZE
    scales, scaled_zeros = (tensors[name][:groups] for name in ("scales", "scaled_zeros"))
    # A scale of zero makes the whole group zero, whatever its zero point.
    divisor = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    zeros = (-scaled_zeros.float() / divisor).round().clamp(0, LEVELS).to(torch.uint8)
    return _weight(tensors, unpack_int16(tensors["qweight"]), scales, zeros)


def _marlin_tensors(rows: int, columns: int) -> dict[str, Stored]:
    groups = columns // GROUP_SIZE
    return {
        "qweight": Stored("I32", (columns // 16, 2 * rows)),
        "qzeros": Stored("I32", (groups, rows // 8)),
        "scales": Stored("F16", (groups, rows)),
        "input_global_scale": Stored("F32", () if groups > 1 else (1,)),
    }


def _read_marlin(tensors: Mapping[str, Tensor]) -> ParoWeight:
    scales = tensors["scales"]
    if len(scales) > 1:  # of a single group they are the numbers themselves
        scales = (scales.view(torch.int16).float() * tensors["input_global_scale"]).half()
    zeros = unpack_marlin_zeros(tensors["qzeros"])
    return _weight(tensors, unpack_marlin(tensors["qweight"]), unpack_marlin_scales(scales), zeros)


def _weight(tensors: Mapping[str, Tensor], codes: Tensor, scales: Tensor, zeros: Tensor) -> ParoWeight:
    """From codes uint8 [N, K], and scales and zero points [groups, N]."""
    matrix = Int4Weight(pack_bytes(codes.contiguous()), scales.T.contiguous(), zeros.T.contiguous())
    return ParoWeight(tensors["pairs"], tensors["theta"], tensors["channel_scales"].flatten(), matrix)


def _unpacked_tensors(rows: int, columns: int) -> dict[str, Stored]:
    groups = columns // GROUP_SIZE
    return {
        "codes": Stored("U8", (rows, columns // 2)),
        "scales": Stored("F16", (rows, groups)),
        "zeros": Stored("U8", (rows, groups)),
    }


def _read_unpacked(tensors: Mapping[str, Tensor]) -> ParoWeight:
    matrix = Int4Weight(*(tensors[name] for name in Int4Weight._fields))
    return ParoWeight(tensors["pairs"], tensors["theta"], tensors["channel_scales"].flatten(), matrix)


def write_unpacked(weight: ParoWeight) -> dict[str, Tensor]:
    """To our own layout, which is read without any permutation."""
    rotation = {"theta": weight.angles, "pairs": weight.pairs, "channel_scales": weight.channel_scales[None]}
    return rotation | weight.matrix._asdict()


GENERIC = Layout("generic (paroquant)", _generic_tensors, read_generic, (8, GROUP_SIZE))
INT16 = Layout("int16 (research code)", _int16_tensors, _read_int16, (4, GROUP_SIZE))
MARLIN = Layout("Marlin (-PARO)", _marlin_tensors, _read_marlin, (64, GROUP_SIZE))
#: Of our cache, and of no checkpoint.
UNPACKED = Layout("unpacked", _unpacked_tensors, _read_unpacked, (1, GROUP_SIZE))
LAYOUTS = (GENERIC, INT16, MARLIN)


def layout_of(rows: int, columns: int, found: Mapping[str, Stored]) -> Layout:
    """The layout of an N x K matrix.

    Args:
        rows, columns: N and K.
        found: Its tensors in the files, by the last part of their names. The packed integers decide; where they are
            missing or of no known shape, the names.
    """
    packed = found.get("qweight")
    for layout in LAYOUTS:
        if packed == layout.tensors(rows, columns)["qweight"]:
            return layout
    return max(LAYOUTS, key=lambda layout: len(found.keys() & layout.tensors(rows, columns).keys()))
