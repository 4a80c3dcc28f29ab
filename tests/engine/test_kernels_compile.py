"""Kernels that the interpreter runs on a CPU compile for a Hopper GPU, which needs none."""

import os
import subprocess
import sys

import pytest

from support.kernel_launches import record

pytest.importorskip("triton", reason="the kernels need the triton package")

#: Compiles one kernel: types of its arguments, and the numbers that the release's dimensions put in.
PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from flashdrive_node.engine.kernels import (
    triton_ageing,
    triton_attention,
    triton_byte_linear,
    triton_elementwise,
    triton_int4_linear,
    triton_join,
    triton_linear,
    triton_patches,
    triton_rotary,
    triton_rotate_quantise,
    triton_round_rows,
    triton_sampling,
    triton_vision,
    triton_waypoints,
)


def check(kernel, types, capability=90, **constants):
    signature = dict(zip(kernel.arg_names, types.split(), strict=False))
    assert len(signature) + len(constants) == len(kernel.arg_names), kernel.arg_names
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["cubin"]


heads = {"HEADS": 8, "PADDED_HEADS": 8, "HALF": 64, "PADDED_HALF": 64}
check(triton_ageing._age, "*bf16 *bf16 *bf16 *i64 *i64 *i64 *i32 *bf16 *bf16 i32 i32", STEPS=3, **heads)
heads = {"HEADS": 16, "PADDED_HEADS": 16, "HALF": 36, "PADDED_HALF": 64}
check(triton_vision._rotate, "*bf16 *fp32 *fp32 i32", **heads, EARLY=True)
for out, form in (("*bf16", {"LARGEST": 0.0, "FIXED": False}), ("*fp8e4nv", {"LARGEST": 448.0, "FIXED": False})):
    types = "*bf16 " * 5 + out + " *fp32 i32 i32 i32 fp32 fp32"
    check(triton_vision._layer_norm, types, ADD=True, PADDED=2048, EARLY=True, **form)
resize = {"TAPS": 15, "BITS": 16, "CHANNELS": 3, "EARLY": True}
check(triton_patches._columns, "*u8 *i32 *i32 *u8" + " i32" * 7, BLOCK=512, **resize)
cut = {"PATCH": 16, "MERGE": 2, "TEMPORAL": 2, "BLOCK": 1024}
check(triton_patches._rows, "*u8 *i32 *i32 *bf16 *bf16 i32 i32 i32", **cut, **resize)
tile = {"COUNT": 64, "ROWS": 64, "BLOCK": 128, "STAGES": 3}
check(triton_linear._linear, "*bf16 *bf16 *bf16 i32 i32 i32", **tile, SPLITS=1, GATED=True, EARLY=True)
check(triton_linear._linear, "*bf16 *bf16 *fp32 i32 i32 i32", **tile, SPLITS=4, GATED=False, EARLY=False)
pointers = "*bf16 *fp32 *bf16 *bf16 *bf16"
check(triton_elementwise._rms_norm, pointers + " i32 i32 i32 i32 fp32", ADD=True, PARTS=4, PADDED=2048, EARLY=True)
heads = {"HEADS": 16, "KV_HEADS": 8, "DIM": 128, "TOGETHER": 8}
for qkv, parts in (("*fp32", 2), ("*bf16", 1)):
    pointers = qkv + " *fp32 *fp32 *bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *i64 *bf16 *i64"
    options = {"KEEP": True, "PARTS": parts, "UNSCALED": parts == 1, "EARLY": True}
    check(triton_rotary._norm_rope_write, pointers + " fp32" + " i32" * 7, **heads, **options)
heads = {"GROUP": 4, "HEADS": 32, "DIM": 128, "SPANS": 2, "ROWS": 32, "BLOCK": 64, "SPLITS": 16, "STAGES": 3}
pointers = "*bf16 *bf16 *bf16 *i64 *i64 *bf16 *fp32 *fp32"
check(triton_attention._attend, pointers + " i32" * 6 + " fp32", EARLY=True, **heads)
check(triton_join._join, "*fp32 *fp32 *bf16 i32", DIM=128, SPLITS=16, PADDED=16, EARLY=True)
joined = {"HEADS": 16, "PADDED": 16, "DIM": 128, "SPLITS": 8, "LARGEST": 448.0, "FIXED": False, "EARLY": True}
check(triton_join._join_round, "*fp32 *fp32 *bf16 *fp8e4nv *fp32 i32 fp32", **joined)
tile = {"ROWS": 16, "COLUMNS": 32}
features = "*fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32"
check(triton_waypoints._features, features, CHANNELS=2, FREQUENCIES=10, EARLY=True, **tile)
check(triton_waypoints._normed_linear, "*fp32 " * 5 + "i32 i32 i32 fp32", ACTIVATE=True, BLOCK=64, EARLY=True, **tile)
check(triton_waypoints._velocity, "*bf16 *fp32 *fp32 *fp32 i32 i32", CHANNELS=2, PADDED=2048, EARLY=True)
shape = {"CHUNKS": 39, "PADDED": 64}
tried = {"BLOCK": 4096, "TRIED": 16}
check(triton_sampling._narrow, "*bf16 *fp32 *i32 *fp32 *i32 i32 fp32 fp32", FIRST=False, **shape, **tried)
check(triton_sampling._race, "*bf16 *fp32 *fp32 *i32 *fp32 *i32 i32 fp32 fp32", ALL=False, **shape, **tried)
check(triton_sampling._finish, "*fp32 *i32 *i64", **shape)
for values, largest in (("*i8", 127.0), ("*bf16", 0.0)):
    rows = "*fp32 " + values + " *fp32 *fp32 i32 i32 i32 fp32"
    groups = {"GROUPS": 32, "WIDTH": 128, "LARGEST": largest, "FIXED": False, "EARLY": True}
    check(triton_rotate_quantise._round_groups, rows, **groups)
rounding = {"LARGEST": 448.0, "FIXED": False, "EARLY": True}
for update, parts in (("*fp32", 2), ("*bf16", 1)):
    rows = "*bf16 " + update + " *fp32 *fp32 *bf16 *bf16 *fp8e4nv *fp32 i32 i32 i32 i32 fp32 fp32"
    added = {"ADD": True, "PARTS": parts, "UNSCALED": parts == 1, "PADDED": 4096}
    check(triton_round_rows._norm_round, rows, **added, **rounding)
for source, unscaled in ((0, False), (1, False), (1, True), (2, False)):
    stretches = {"STRETCH": 1024, "STRETCHES": 5, "SOURCE": source, "UNSCALED": unscaled, **rounding}
    check(triton_round_rows._round_rows, "*bf16 *fp32 *fp32 *fp8e4nv *fp32 i32 i32 fp32", **stretches)
check(triton_rotate_quantise._turn, "*bf16 *bf16 *fp32 i32 i32 i32", GATED=True, TOKENS=16, WIDTH=128, EARLY=True)
tiles = {"ROWS": 64, "SPLITS": 2, "STAGES": 4}
for capability in (80, 90):
    for x, scaled in (("*i8", True), ("*bf16", False)):
        types = x + " *fp32 *fp32 *u8 *fp16 *u8 *fp32 i32 i32 i32"
        tokens = {"SCALED": scaled, "ASSEMBLY": True, "TOKENS": 16, "HALF": 64, "EARLY": capability >= 90}
        check(triton_int4_linear._int4_linear, types, capability, **tokens, **tiles)
check(triton_round_rows._round_twice, "*bf16 *i8 *fp32 i32 i32 i32", PADDED=4096, EARLY=True)
bytes_ = {"COUNT": 16, "BLOCK": 128}
for capability, types in ((80, "*i8 *i8"), (90, "*i8 *i8"), (89, "*fp8e4nv *fp8e4nv"), (90, "*fp8e4nv *fp8e4nv")):
    given = types + " *fp32 *fp32 *fp32 i32 i32 i32"
    form = {"TERMS": 1 + ("i8" in types), "EARLY": capability >= 90}
    check(triton_byte_linear._byte_linear, given, capability, **form, **bytes_, **tiles)
"""


def test_kernels_compile_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_kernels_of_the_quantised_presets_compile(tmp_path, monkeypatch):
    """In every way in which the engine launches them."""
    launches = tmp_path / "launches.json"
    assert record(["fp8", "w4a8"], launches, monkeypatch) > 30
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(("tests", environment.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "support.kernel_launches", str(launches)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
