"""Makes ``tests/data/paroquant_layer.safetensors`` with the packing code of the PyPI package paroquant 0.1.16.

    pip download paroquant==0.1.16 --no-deps && unzip paroquant-*.whl -d PATH
    PYTHONPATH=PATH python tests/support/make_paroquant_layer.py

Its rotation kernel needs CUDA; here the rule of that kernel is written out pair by pair in float64.
"""

import importlib
import math
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROWS, COLUMNS, GROUP, ROUNDS = 24, 256, 128, 8


def rotation(x: Tensor, pairs: Tensor, angles: Tensor, scales: Tensor | None = None, group_size: int = GROUP) -> Tensor:
    y = x.double().clone() if scales is None else x.double() * scales.double()
    for r in range(pairs.shape[0]):
        for t in range(pairs.shape[1] // 2):
            first = 2 * t // group_size * group_size
            i, j = first + int(pairs[r, 2 * t]), first + int(pairs[r, 2 * t + 1])
            c, s = math.cos(float(angles[r, t])), math.sin(float(angles[r, t]))
            y[..., i], y[..., j] = y[..., i] * c + y[..., j] * s, y[..., i] * -s + y[..., j] * c
    return y.to(x.dtype)


def main() -> None:
    kernels = types.ModuleType("paroquant.kernels.cuda")
    kernels.scaled_pairwise_rotation = rotation  # type: ignore[attr-defined]
    datasets = types.ModuleType("datasets")  # imported by the package for its calibration texts, not needed here
    datasets.load_dataset = None  # type: ignore[attr-defined]
    sys.modules |= {"paroquant.kernels.cuda": kernels, "datasets": datasets}
    convert = importlib.import_module("paroquant.cli.convert")
    qlinear = importlib.import_module("paroquant.optim.qlinear")

    g = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = torch.randn(ROWS, COLUMNS, generator=g) * 0.05
    pairs = torch.rand(ROUNDS, COLUMNS // GROUP, GROUP, generator=g).argsort(-1).flatten(1).short()
    # Stored angles are float16: drawn as such, so that the package's own layer and the stored one are the same.
    angles = (torch.rand(ROUNDS, COLUMNS // 2, generator=g) - 0.5).half().float()
    scales = 2.0 ** torch.randint(-2, 3, (COLUMNS,), generator=g)
    layer = qlinear.PseudoQuantizedLinear(
        linear,
        (pairs, angles, torch.zeros_like(angles, dtype=torch.bool)),
        scales.half(),
        group_size=GROUP,
        n_bits=4,
        num_rotations=torch.tensor(ROUNDS),
    )
    # In float32, as the conversion is: in float16 a few codes would round the other way.
    layer.float()
    layer.set_optim_enabled(quantizer=True)
    layer.quantizer.scale.data = layer.quantizer.scale.data.half().float()
    state = layer.state_dict() | {"pairs_grouped": pairs, "angles_grouped": angles}
    buffers, bits, group_size, rounds = convert._quantize_layer(state, device="cpu")
    assert (bits, group_size, rounds) == (4, GROUP, ROUNDS)
    expected = layer.pseudo_weight().float()
    tensors = {f"layer.{name}": tensor.contiguous() for name, tensor in buffers.items()} | {"pseudo_weight": expected}
    save_file(tensors, Path(__file__).parents[1] / "data" / "paroquant_layer.safetensors")


if __name__ == "__main__":
    main()
