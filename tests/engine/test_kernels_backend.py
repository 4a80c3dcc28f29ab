"""Which form of a kernel runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    mask = group_mask(visible.mask(12), 2, q.dtype)
    assert torch.equal(attend_visible(q, k, v, visible), attend(q, k[:, :12], v[:, :12], mask))
    assert torch.equal(attend_visible(q, k, v, up_to(torch.full((5,), 9))), attend(q, k[:, :9], v[:, :9]))
    assert torch.equal(attend_visible(q, k, v, up_to(torch.zeros(5, dtype=torch.int64))), torch.zeros(5, 64))


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 4000), group=st.integers(1, 8), heads=st.integers(1, 16), slots=st.integers(1, 9000))
def test_attention_tilings_fit_the_device(tokens, group, heads, slots):
    triton_attention = pytest.importorskip("flashdrive_node.engine.kernels.triton_attention")
    t = triton_attention.tiling(tokens, group, heads, slots, processors=132)
    assert all(n & (n - 1) == 0 for n in (t.rows, t.block, t.warps))
    assert t.rows >= 16
    # Splitting serves to fill a device, not to queue up on it.
    tiles = -(-tokens * group // t.rows) * heads
    assert t.splits == 1 or tiles * t.splits <= 132


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 64), size=st.integers(1, 20000), out_size=st.integers(1, 200000))
def test_product_tilings_leave_work_for_every_part(count, size, out_size):
    triton_linear = pytest.importorskip("flashdrive_node.engine.kernels.triton_linear")
    t = triton_linear.tiling(count, size, out_size, processors=132)
    assert all(n & (n - 1) == 0 for n in (t.rows, t.block, t.warps))
    assert 1 <= t.splits <= 4
    assert t.splits == 1 or t.splits * 512 < size + 512
