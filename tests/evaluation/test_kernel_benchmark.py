"""The kernels' benchmark on a small model: every case runs in both forms and gives the same."""

from __future__ import annotations

import json

import pytest
import torch

from flashdrive_node.cli.main import main
from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.evaluation.kernel_benchmark import (
    KernelTime,
    kernel_figure,
    kernel_json,
    kernel_markdown,
    measure_kernels,
)
from flashdrive_node.evaluation.kernel_cases import Shapes, kernel_cases
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
    assert len(names) == 19


def test_measuring_gives_positive_times_for_every_case():
    with forced("reference"):
        cases = list(kernel_cases(small_config(), SMALL, torch.device("cpu"), torch.float32))
        times = measure_kernels(cases, torch.device("cpu"), repeats=1)
    assert [t.name for t in times] == [c.name for c in cases]
    assert all(t.torch_ms > 0 and t.own_ms > 0 and t.gigabytes_per_s > 0 for t in times)


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
