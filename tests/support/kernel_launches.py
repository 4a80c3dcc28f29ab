"""Which kernels the engine launches, and how: of a small model on a CPU, by a run in which no kernel computes anything.

Run as a program it compiles what it was told of for a Hopper GPU: ``python -m support.kernel_launches FILE``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch

from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.evaluation.benchmark import make_engine
from flashdrive_node.evaluation.configurations import Procedure
from flashdrive_node.evaluation.random_drive import RandomDrive
from flashdrive_node.evaluation.random_networks import random_drafter, random_model
from support.narrow_release import small_alpamayo

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.bool: "i1",
}  # fmt: skip


def record(presets: list[str], path: Path, monkeypatch: Any) -> int:
    """Write down every way in which the engine launches a kernel, in bfloat16 as on a GPU; their number."""
    from triton.runtime import interpreter

    found: dict[str, dict[str, Any]] = {}

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        entry = _described(self.fn, args, options)
        found.setdefault(json.dumps([entry["kernel"], entry["types"], entry["traits"]]), entry)

    empty = torch.empty
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
    # What kernels would have filled is 0.
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).zero_())
    for preset in presets:
        _run_windows(preset)
    path.write_text(json.dumps(list(found.values())))
    return len(found)


def _run_windows(preset: str) -> None:
    config = small_alpamayo()
    for samples in (1, 3):
        settings = PlainSettings("random", device="cpu", precision=preset, image_size=(64, 96), samples=samples)
        loaded = random_model(config, settings.torch_device, torch.bfloat16, settings.stages)
        drive = RandomDrive(config, settings.image_size, settings.cameras, settings.frames)
        drafter = random_drafter(loaded.model, stages=loaded.precision)
        with forced("triton"):
            engine = make_engine("all", Procedure(), settings, loaded, drafter)
            for i in range(2):  # the second one is streamed
                engine.step(drive.window(i))
            engine.close()


def _described(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """A launch: types of its arguments, its constants, and what of these changes the program beyond its sizes."""
    names = inspect.signature(function).parameters
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
    types, constants = {}, {}
    for name, parameter in names.items():
        value = values[name]
        if "constexpr" in str(parameter.annotation):
            constants[name] = getattr(value, "value", value)
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + _TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    traits = {k: v if isinstance(v, bool) else min(v, 2) for k, v in constants.items()}
    kernel = [function.__module__, function.__name__]
    return {
        "kernel": kernel, "types": types, "constants": constants, "traits": traits,
        "warps": options.get("num_warps", 4),
    }  # fmt: skip


def compile_all(path: Path) -> None:
    """Compile what was recorded, as kernels that begin early."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    for entry in json.loads(path.read_text()):
        module, name = entry["kernel"]
        kernel, constants = getattr(importlib.import_module(module), name), entry["constants"]
        constants |= {"EARLY": True} if "EARLY" in constants else {}
        signature = {n: entry["types"].get(n, "constexpr") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": entry["warps"], "launch_pdl": True}
        assert compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"], entry


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]))
