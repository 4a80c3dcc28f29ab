"""The packings of public 4-bit checkpoints written out place by place, for tests of the code that undoes them.

Marlin: which half byte a thread of ``awq_marlin_repack`` (vLLM, 8-bit activations) writes where. int16: the steps of
``pack_intweight`` (llm-awq), one transposition each.
"""

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.model.int4 import unpack_bytes
from flashdrive_node.model.paroquant import ParoWeight


def marlin_words(codes: Tensor) -> Tensor:
    """Codes [N, K] to int32 [K / 16, 2 N]."""
    rows, columns = codes.shape
    words = np.zeros(rows * columns // 8, np.uint32)
    values = codes.numpy().astype(np.uint32)
    for k_tile in range(columns // 32):
        for n_tile in range(rows // 32):
            first = (k_tile * (rows // 32) + n_tile) * 128
            for thread in range(32):
                for warp in range(4):
                    n = 32 * n_tile + warp // 2 * 16 + warp % 2 * 8 + thread // 4
                    k = 32 * k_tile + thread % 4 * 4
                    taken = [values[n, k + i] for i in range(4)] + [values[n, k + 16 + i] for i in range(4)]
                    for place, source in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
                        words[first + thread * 4 + warp] |= taken[source] << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32)).view(columns // 16, 2 * rows)


def int16_words(codes: Tensor) -> Tensor:
    """Codes [N, K] to int16 [N / 4, K]."""
    rows, columns = codes.shape
    x = codes.numpy().astype(np.uint16)
    x = x.reshape(rows, columns // 32, 4, 4, 2).swapaxes(2, 3).reshape(rows, columns // 8, 4, 2).swapaxes(2, 3)
    x = x.reshape(rows // 4, 4, columns // 64, 64).swapaxes(1, 2).reshape(rows // 4, columns, 4)
    packed = x[..., 0] | x[..., 1] << 4 | x[..., 2] << 8 | x[..., 3] << 12
    return torch.from_numpy(packed.astype(np.uint16).view(np.int16))


def marlin_tensors(weight: ParoWeight) -> dict[str, Tensor]:
    """A layer as the ``-PARO`` checkpoints have it, by names behind the layer's."""
    scales, zeros = weight.matrix.scales.T, weight.matrix.zeros.T
    order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    scales = scales.unflatten(1, (-1, 32))[..., order].flatten(1)
    factor = torch.ones(1)
    if len(scales) > 1:
        factor = scales.max().float() / 4096
        scales = (scales.float() / factor).round().to(torch.int16).view(torch.float16)
    permuted = zeros.unflatten(1, (-1, 64))[..., [i + 8 * j for i in range(8) for j in range(8)]].flatten(1)
    words = np.zeros((len(zeros), zeros.shape[1] // 8), np.uint32)
    for place in range(8):
        words |= permuted.numpy().astype(np.uint32)[:, place::8] << np.uint32(4 * place)
    return _rotation(weight, "rotate_linear.") | {
        "rotate_linear.qlinear.qweight": marlin_words(unpack_bytes(weight.matrix.codes)),
        "rotate_linear.qlinear.qzeros": torch.from_numpy(words.view(np.int32)),
        "rotate_linear.qlinear.scales": scales.contiguous(),
        "rotate_linear.qlinear.input_global_scale": factor,
        "rotate_linear.qlinear.workspace": torch.zeros(188, dtype=torch.int32),
        "rotate_linear.qlinear.g_idx": torch.zeros(0, dtype=torch.int32),
        "rotate_linear.qlinear.g_idx_sort_indices": torch.zeros(0, dtype=torch.int32),
    }


def int16_tensors(weight: ParoWeight) -> dict[str, Tensor]:
    """A layer as ParoQuant's research code has it, by names behind the layer's."""
    rows, groups = weight.matrix.scales.shape
    scales, scaled_zeros = torch.zeros(2, -(-groups // 8) * 8, rows, dtype=torch.float16)
    scales[:groups] = weight.matrix.scales.T
    scaled_zeros[:groups] = -(weight.matrix.scales.float() * weight.matrix.zeros.float()).T.half()
    return _rotation(weight) | {
        "qlinear.qweight": int16_words(unpack_bytes(weight.matrix.codes)),
        "qlinear.scales": scales,
        "qlinear.scaled_zeros": scaled_zeros,
    }


def _rotation(weight: ParoWeight, wrapper: str = "") -> dict[str, Tensor]:
    return {
        f"{wrapper}rotation.theta": weight.angles,
        f"{wrapper}rotation.pairs": weight.pairs,
        f"{wrapper}rotation.channel_scales": weight.channel_scales[None],
    }
