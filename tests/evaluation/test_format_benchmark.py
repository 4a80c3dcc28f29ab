"""Products in every format on a small model: all variants of a shape give about the same, and are measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flashdrive_node.cli import benchmark_kernels as command
from flashdrive_node.cli.main import main
from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.evaluation import kernel_tilings
from flashdrive_node.evaluation.format_benchmark import (
    FormatTime,
    best_markdown,
    format_figure,
    format_json,
    format_markdown,
    measure_formats,
)
from flashdrive_node.evaluation.humming_cases import HUMMING, Humming
from support.kernel_inputs import DEVICE, DTYPE
from support.small_models import small_config

pytest.importorskip("triton", reason="the kernels need the triton package")
cases = pytest.importorskip("flashdrive_node.evaluation.format_cases")
Tiling = pytest.importorskip("flashdrive_node.engine.kernels.triton_linear").Tiling


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch):
    """A model of one group of channels, and of few tokens and copies."""
    monkeypatch.setattr(cases, "TEXT_TOKENS", (2,))
    monkeypatch.setattr(cases, "_EXPERT_TOKENS", (3,))
    monkeypatch.setattr(cases, "_HEAD_TOKENS", (1,))
    monkeypatch.setattr(cases, "_PATCHES", (5,))
    monkeypatch.setattr(cases, "_COLD_BYTES", 1)
    small = small_config()
    tokens = replace(small.tokens, vocab_size=100)
    return replace(small, tokens=tokens, text=replace(small.text, hidden_size=128, intermediate_size=128))


class _Layer(torch.nn.Module):
    """The package's layer as it says what it takes: integers eight to a word along columns, or rows for zero points."""

    def __init__(self, shape_n: int, shape_k: int, weight_config: dict, input_config: dict, torch_dtype: torch.dtype):
        super().__init__()
        assert weight_config == {"dtype": "uint4", "group_size": 128, "has_zero_point": True}
        self.shape, self.dtype, self.kind = (shape_n, shape_k), torch_dtype, input_config["dtype"]

    def load_from_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def transform(self) -> None:
        codes = _fours(self.tensors["weight"]).unflatten(1, (-1, 128))
        zeros, scales = _fours(self.tensors["zero_point"].T).T, self.tensors["weight_scale"]
        assert scales.dtype == self.dtype
        self.weight = ((codes - zeros[..., None]) * scales.float()[..., None]).flatten(1)
        assert self.weight.shape == self.shape

    def forward(self, inputs: torch.Tensor, input_scale: torch.Tensor | None = None) -> torch.Tensor:
        assert str(inputs.dtype).replace("_", "").startswith(f"torch.{self.kind}")
        scale = 1.0 if input_scale is None else input_scale
        return (inputs.float() @ self.weight.T * scale).to(self.dtype)


class _MixesRows(_Layer):
    def transform(self) -> None:
        self.tensors["weight_scale"] = self.tensors["weight_scale"].flip(0)
        super().transform()


class _FailsToCompile(_Layer):
    def forward(self, inputs: torch.Tensor, input_scale: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError("nvcc failed\n  with exit code 1")


def _fours(words: torch.Tensor) -> torch.Tensor:
    assert words.dtype == torch.int32
    return ((words[..., None] >> torch.arange(0, 32, 4, device=words.device)) & 15).flatten(-2)


def _install(monkeypatch: pytest.MonkeyPatch, layer: type[_Layer]) -> None:
    module = ModuleType("humming.layer")
    module.HummingLayer = layer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", module)


def test_every_shape_in_every_format(config) -> None:
    seen: dict[str, set[str]] = {}
    text = config.text
    with forced("triton"):
        for case in cases.format_cases(config, DEVICE, DTYPE):
            assert case.calls.keys() <= set(cases.FORMATS)
            results = {name: calls[0]() for name, calls in case.calls.items()}
            if case.weight_bytes:
                assert len({result.shape for result in results.values()}) == 1
                assert next(iter(results.values())).shape[0] == case.tokens
                assert case.calls.keys() <= case.weight_bytes.keys()
                torch.testing.assert_close(
                    results["bf16"], results.get("bf16 own", results["bf16"]), rtol=2e-2, atol=2e-2
                )
            seen.setdefault(case.name, set()).update(case.calls)
    assert seen[f"q/k/v {text.q_size + 2 * text.kv_size} x 128"] == set(cases.FORMATS) - {"int8 own"}
    assert seen["sum, norm and rounding, 128"] == {"bf16 own", "fp8 own", "w4a16", "w4a8"}
    assert next(names for name, names in seen.items() if "head" in name) == {"bf16", "bf16 own", "int8 own"}
    assert {"expert down", "vision first"} <= {" ".join(name.split()[:2]) for name in seen}


def test_tilings_compute_the_same(config, monkeypatch: pytest.MonkeyPatch) -> None:
    for few in ("_few_tilings", "_many_tilings"):
        chosen = getattr(cases, few)()
        assert len({cases._tiling_name(t) for t in chosen}) == len(chosen)
        monkeypatch.setattr(cases, few, lambda chosen=chosen: chosen[:: len(chosen) - 1])
    with forced("triton"):
        case = next(iter(cases.tiling_cases(config, DEVICE, DTYPE)))
        first, second = (calls[0]() for calls in case.calls.values())
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-2)


def test_products_of_humming(config, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Layer)
    humming = Humming()
    with forced("triton"):
        found = [
            case for case in cases.format_cases(config, DEVICE, DTYPE, humming) if set(HUMMING) & case.calls.keys()
        ]
    assert [case.name.split()[0] for case in found] == ["q/k/v", "gate/up", "down"]  # what has groups of 128
    for case in found:
        assert set(HUMMING) <= case.calls.keys() & case.weight_bytes.keys()
        assert len({case.calls[name][0]().shape for name in (*HUMMING, "bf16")}) == 1
        assert all(len(case.calls[name]) == len(case.calls["w4a8"]) for name in HUMMING)
    assert humming.errors.keys() == set(HUMMING)
    assert all(0 < error < 4e-3 for error in humming.errors.values())
    assert not humming.failures
    assert len(humming.notes()) == 3


@pytest.mark.parametrize(("layer", "reason"), [(_MixesRows, "wrong"), (_FailsToCompile, "nvcc failed with exit")])
def test_what_humming_gets_wrong(config, monkeypatch: pytest.MonkeyPatch, layer: type[_Layer], reason: str) -> None:
    monkeypatch.setattr(cases, "TEXT_TOKENS", (2, 3))
    one = cases.matrices(config)[:1]
    monkeypatch.setattr(cases, "matrices", lambda _: one)
    _install(monkeypatch, layer)
    humming = Humming()
    with forced("triton"):
        found = list(cases.format_cases(config, DEVICE, DTYPE, humming))
    assert not any(set(HUMMING) & case.calls.keys() for case in found)
    assert all("w4a8" in case.calls for case in found if case.weight_bytes)
    # A wrong product is tried again with other rows, one that does not compile is not.
    assert len(humming.failures) == len(HUMMING) * (2 if layer is _MixesRows else 1)
    assert all(reason in line and "q/k/v" in line for line in humming.notes())


@pytest.mark.parametrize("installed", [False, True])
def test_command(
    config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], installed: bool
) -> None:
    if installed:
        _install(monkeypatch, _Layer)
    else:
        monkeypatch.setitem(sys.modules, "humming", None)
    monkeypatch.setitem(command.DIMENSIONS, "10b", lambda: config)
    one = cases.matrices(config)[:1]
    monkeypatch.setattr(cases, "matrices", lambda _: one)
    monkeypatch.setattr(kernel_tilings, "bf16_tiling_cases", lambda *_: [])  # of a whole window: too much here
    monkeypatch.setattr(cases, "_few_tilings", lambda: [Tiling(64, 16, 1, 4, 2)])
    monkeypatch.setattr(cases, "_many_tilings", lambda: [Tiling(64, 16, 1, 4, 3)])
    arguments = ["benchmark-kernels", "--device", DEVICE.type, "--repeats", "1", "--tables", "formats", "tilings"]
    with forced("triton"):
        assert main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| gate and rounding, 128 | 2 | – |" in out
    assert "64 x 16, 1 split(s), 4 warps, 3 stages" in out
    assert ("| w4a8 | humming w4a16 | humming w4a8 | humming w4a8 fp8 |" in out) == installed
    assert ("humming-kernels does not load: ModuleNotFoundError" in out) != installed
    conditions = json.loads((tmp_path / "formats.json").read_text())["conditions"]
    assert ("relative errors" if installed else "does not load") in conditions["humming-kernels"]
    assert {f.name for f in tmp_path.iterdir()} == {
        "formats.json", "formats.md", "formats.png", "tilings.json", "tilings.md",
    }  # fmt: skip


def test_measuring(config) -> None:
    calls = {"bf16": [lambda: torch.zeros(1)] * 3, "w4a8": [lambda: torch.zeros(1)]}
    case = cases.FormatCase("a shape", 8, calls, {"w4a8": 10**6})
    (time,) = measure_formats([case], torch.device("cpu"), repeats=1)
    assert time.us.keys() == calls.keys()
    assert all(us > 0 for us in time.us.values())
    assert time.gigabytes_per_s == {"w4a8": pytest.approx(1e3 / time.us["w4a8"])}


def test_tables_file_and_figure() -> None:
    times = [
        FormatTime("q/k/v", 1, {"bf16": 13.0, "w4a8": 5.04}, {"w4a8": 2600.0}),
        FormatTime("q/k/v", 897, {"bf16": 60.0, "fp8": 31.0, "w4a8": 45.0}, {}),
    ]
    table = format_markdown(times, cases.FORMATS)
    assert "| q/k/v | 1 | 13.0 | – | – | – | – | – | **5.0** |" in table
    assert "| q/k/v | 897 | fastest" not in best_markdown(times)
    assert "| q/k/v | 897 | 31.0: fp8; 45.0: w4a8 |" in best_markdown(times, 2)
    content = json.loads(format_json(times, {"device": "a card"}))
    assert content["products"][1]["us"]["fp8"] == 31.0
    assert format_figure(times, cases.FORMATS, "a card").startswith(b"\x89PNG")
