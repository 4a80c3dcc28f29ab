"""Kernels that the interpreter runs on a CPU compile for a Hopper GPU, which needs none."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need the triton package")

#: Compiles one kernel: types of its arguments, and the numbers that the release's dimensions put in.
PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from flashdrive_node.engine.kernels import (
    triton_ageing,
    triton_elementwise,
    triton_linear,
    triton_rotary,
    triton_sampling,
    triton_vision,
)


def check(kernel, types, **constants):
    signature = dict(zip(kernel.arg_names, types.split(), strict=False))
    assert len(signature) + len(constants) == len(kernel.arg_names), kernel.arg_names
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]


heads = {"HEADS": 8, "PADDED_HEADS": 8, "HALF": 64, "PADDED_HALF": 64}
check(triton_ageing._age, "*bf16 *bf16 *bf16 *i64 *i64 *i64 *i32 *bf16 *bf16 i32 i32", STEPS=3, **heads)
heads = {"HEADS": 16, "PADDED_HEADS": 16, "HALF": 36, "PADDED_HALF": 64}
check(triton_vision._rotate, "*bf16 *fp32 *fp32 i32", **heads)
check(triton_vision._layer_norm, "*bf16 " * 6 + "i32 i32 i32 fp32", ADD=True, PADDED=2048)
tile = {"COUNT": 64, "ROWS": 64, "BLOCK": 128, "STAGES": 3}
check(triton_linear._linear, "*bf16 *bf16 *bf16 i32 i32 i32", **tile, SPLITS=1, GATED=True)
check(triton_linear._linear, "*bf16 *bf16 *fp32 i32 i32 i32", **tile, SPLITS=4, GATED=False)
pointers = "*bf16 *fp32 *bf16 *bf16 *bf16"
check(triton_elementwise._rms_norm, pointers + " i32 i32 i32 i32 fp32", ADD=True, PARTS=4, PADDED=2048)
pointers = "*fp32 *bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *i64 *bf16 *i64"
heads = {"HEADS": 16, "KV_HEADS": 8, "DIM": 128, "TOGETHER": 8}
check(triton_rotary._norm_rope_write, pointers + " fp32" + " i32" * 7, **heads, KEEP=False, PARTS=2)
shape = {"CHUNKS": 39, "PADDED": 64}
tried = {"BLOCK": 4096, "TRIED": 16}
check(triton_sampling._narrow, "*bf16 *fp32 *i32 *fp32 *i32 i32 fp32 fp32", FIRST=False, **shape, **tried)
check(triton_sampling._race, "*bf16 *fp32 *fp32 *i32 *fp32 *i32 i32 fp32 fp32", ALL=False, **shape, **tried)
check(triton_sampling._finish, "*fp32 *i32 *i64", **shape)
"""


def test_kernels_compile_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
