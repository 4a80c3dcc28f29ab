"""Which form of a kernel runs."""

from __future__ import annotations

import pytest
import torch

from flashdrive_node.engine.kernels import backend
from flashdrive_node.engine.kernels.attention import attend_visible
from flashdrive_node.engine.kernels.visibility import up_to
from flashdrive_node.model.attention import attend, group_mask
from flashdrive_node.model.errors import InputError

HALF = torch.zeros(1, dtype=torch.float16)


@pytest.fixture(autouse=True)
def _fresh_environment(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend.environment.cache_clear()
    yield
    backend.environment.cache_clear()


def test_a_cpu_takes_the_reference_by_itself():
    assert not backend.uses_triton(HALF)


@pytest.mark.parametrize(("name", "expected"), [("triton", True), ("reference", False), ("auto", False)])
def test_the_environment_decides(monkeypatch, name, expected):
    pytest.importorskip("triton", reason="the kernels need the triton package")
    monkeypatch.setenv(backend.VARIABLE, name)
    assert backend.uses_triton(HALF) is expected
    with backend.forced("reference"):
        assert not backend.uses_triton(HALF)
    assert not backend.uses_triton(HALF.float())  # float32 keeps PyTorch's precision


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(InputError, match=r"FLASHDRIVE_KERNELS must be one of .*'reference'.*, found 'cuda'"):
        backend.uses_triton(HALF)


def test_a_demanded_and_missing_triton_is_an_error(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with backend.forced("triton"), pytest.raises(InputError, match="triton package is required"):
        backend.uses_triton(HALF)


def test_the_reference_has_the_bits_of_the_plain_path():
    """The engine on a CPU goes through the kernels' reference and must equal the model's own attention."""
    q, k, v = torch.randn(5, 4, 16), torch.randn(2, 30, 16), torch.randn(2, 30, 16)
    visible = up_to(torch.arange(8, 13))
    mask = group_mask(visible.mask(30), 2, q.dtype)
    assert torch.equal(attend_visible(q, k, v, visible), attend(q, k, v, mask))
