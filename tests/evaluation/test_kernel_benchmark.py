"""The kernels' benchmark on a small model: every case runs in both forms and gives the same."""

from __future__ import annotations

import json

import pytest
import torch

from flashdrive_node.cli.main import main
from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.parts import summed
from flashdrive_node.evaluation.kernel_benchmark import (
    KernelTime,
    kernel_figure,
    kernel_json,
    kernel_markdown,
    measure_kernels,
)
from flashdrive_node.evaluation.kernel_cases import Shapes, kernel_cases
from support.kernel_inputs import DEVICE, DTYPE
from support.small_models import small_config

SMALL = Shapes(prompt=40, computed=12, block=3, samples=2)


def test_both_forms_of_every_case_compute_the_same():
    names = set()
    with forced("reference"):
        for case in kernel_cases(small_config(), SMALL, torch.device("cpu"), torch.float32):
            assert case.bytes > 0
            assert len(case.torch) == len(case.own)
            for ours, theirs in zip(case.own, case.torch, strict=True):
                found, expected = ours(), theirs()
                found = found[1] if isinstance(found, tuple) else found  # the norm beside the sum
                torch.testing.assert_close(found, expected)
            names.add(case.name)
    assert len(names) == 25


def test_measuring_gives_positive_times_for_every_case():
    with forced("reference"):
        cases = list(kernel_cases(small_config(), SMALL, torch.device("cpu"), torch.float32))
        times = measure_kernels(cases, torch.device("cpu"), repeats=1)
    assert [t.name for t in times] == [c.name for c in cases]
    assert all(t.torch_ms > 0 and t.own_ms > 0 and t.gigabytes_per_s > 0 for t in times)


def test_tilings_beside_those_in_use_compute_the_same():
    pytest.importorskip("triton", reason="the kernels need the triton package")
    from flashdrive_node.evaluation.kernel_tilings import bf16_tiling_cases

    cases = list(bf16_tiling_cases(small_config(), SMALL, DEVICE, DTYPE))
    assert {c.name for c in cases} >= {"attention, one token", "q/k/v", "expert's gate/up", "output head"}
    for case in cases:
        assert sum("(in use)" in name for name in case.calls) == 1
        assert len(case.calls) >= 5
    for case in (c for c in cases if c.name in ("attention, block of 3", "gate/up", "expert's down")):
        first, *others = (summed(calls[0](), DTYPE) for calls in case.calls.values())  # type: ignore[arg-type]
        for other in others:
            torch.testing.assert_close(other, first, rtol=0.02, atol=0.02)


def test_table_file_and_figure():
    times = [KernelTime("attention, block of 8", 3.0, 0.4, 1162.0), KernelTime("gate, 8 tokens", 0.2, 0.1, 90.0)]
    assert "| attention, block of 8 | 3.000 | 0.400 | 7.5 | 1,162 |" in kernel_markdown(times)
    content = json.loads(kernel_json(times, {"device": "a card"}))
    assert content["conditions"] == {"device": "a card"}
    assert content["kernels"][1]["own_ms"] == 0.1
    assert kernel_figure(times, "a card").startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_is_refused(capsys):
    assert main(["benchmark-kernels"]) != 0
    assert "needs a CUDA device, found none" in capsys.readouterr().err
