"""Attention by visible slots against a dense computation in float64, in both forms of the kernel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdrive_node.engine.kernels.attention import attend_visible, attend_visible_reference
from flashdrive_node.engine.kernels.backend import forced
from flashdrive_node.engine.kernels.visibility import Visible, block_visibility, up_to, waypoint_visibility
from support.kernel_inputs import DEVICE, DTYPE, assert_close, draw, integers, seeded

pytest.importorskip("triton", reason="the kernels need the triton package")

# The interpreter takes about 10 ms per step of a program; on a GPU nearly every case is another compilation.
CASES = settings(max_examples=12, deadline=None)


def dense(q: Tensor, keys: Tensor, values: Tensor, visible: Visible) -> Tensor:
    """Attention in float64, slots outside of the mask not looked at."""
    group = q.shape[1] // keys.shape[0]
    mask = visible.mask(keys.shape[1])
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for token in range(len(q)):
        k, v = (t[:, mask[token]].double().repeat_interleave(group, dim=0) for t in (keys, values))
        if k.shape[1]:
            scores = torch.einsum("hd,hsd->hs", q[token].double(), k) * q.shape[2] ** -0.5
            out[token] = torch.einsum("hs,hsd->hd", scores.softmax(dim=1), v)
    return out.flatten(1)


@st.composite
def cases(draw_: st.DrawFn) -> tuple[int, int, int, int, Visible]:
    """Seed, group, head_dim, slots, and what 1 to 40 queries see: texts in blocks, waypoints, or anything."""
    seed, group = draw_(st.integers(0, 2**31)), draw_(st.sampled_from([1, 2, 3, 4, 8]))
    dim = draw_(st.sampled_from([64, 128]))
    kind = draw_(st.sampled_from(["limits", "blocks", "waypoints", "anything"]))
    random = seeded(seed)
    prefix = draw_(st.integers(0, 300))
    rows = draw_(st.integers(1, 3))
    if kind == "limits":
        tokens = draw_(st.integers(1, 40))
        visible = up_to(torch.randint(0, 300, (tokens,), generator=random).to(DEVICE))
    elif kind == "blocks":
        size, stretch = draw_(st.integers(1, 9)), draw_(st.integers(20, 100))
        used = torch.randint(0, stretch - size + 1, (rows,), generator=random).to(DEVICE)
        visible = block_visibility(integers([prefix]), used, stretch, size)
    elif kind == "waypoints":
        lengths = torch.randint(0, 30, (rows,), generator=random)
        ends = prefix + lengths.cumsum(0)
        texts = torch.stack((ends - lengths, ends), dim=1).to(DEVICE)
        first = integers([int(ends[-1]) + draw_(st.integers(0, 5))])
        visible = waypoint_visibility(integers([prefix]), texts, first, draw_(st.integers(1, 13)), draw_(st.booleans()))
    else:
        tokens = draw_(st.integers(1, 20))
        cuts = torch.randint(0, 320, (tokens, 5), generator=random).sort(dim=1).values.int().to(DEVICE)
        visible = Visible(cuts[:, 0].contiguous(), cuts[:, 1:].reshape(tokens, 2, 2).contiguous())
    slots = max(int(visible.limits.max()), int(visible.spans.max()) if visible.spans.numel() else 0, 1) + 3
    return seed, group, dim, slots, visible


def inputs(seed: int, group: int, dim: int, slots: int, visible: Visible) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, keys and values; slots that no query sees hold NaN."""
    random = seeded(seed)
    q = draw(random, len(visible.limits), 2 * group, dim)
    keys, values = draw(random, 2, slots, dim), draw(random, 2, slots, dim)
    unseen = ~visible.mask(slots).any(dim=0)
    keys[:, unseen], values[:, unseen] = torch.nan, torch.nan
    return q, keys, values


@CASES
@given(cases())
def test_kernel_equals_dense_computation(case):
    q, keys, values = inputs(*case)
    with forced("triton"):
        found = attend_visible(q, keys, values, case[-1])
    assert found.dtype == DTYPE
    assert_close(found, dense(q, keys, values, case[-1]), ulps=2)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_reference_equals_dense_computation(case):
    q, keys, values = inputs(*case)
    exact = (t.float() for t in (q, keys, values))
    found = attend_visible_reference(*exact, case[-1])
    torch.testing.assert_close(found.double(), dense(q, keys, values, case[-1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "splits"), [(16, 1), (16, 5), (64, 2), (64, 16)])
def test_any_tiling_gives_the_same(rows, splits):
    """Splits without a block, tiles without a full one, and more splits than blocks."""
    from flashdrive_node.engine.kernels import triton_attention

    visible = waypoint_visibility(integers([130]), integers([[130, 137], [137, 150]]), integers([160]), 7)
    q, keys, values = inputs(splits, 4, 64, 180, visible)
    chosen = triton_attention.Tiling(rows, 32, splits, warps=4, stages=2)
    found = triton_attention.attend_visible(q, keys, values, visible, chosen=chosen)
    assert_close(found, dense(q, keys, values, visible), ulps=2)


def test_strided_queries_and_a_layer_of_a_cache():
    visible = up_to(torch.arange(40, 45, device=DEVICE))
    random = seeded(1)
    q = draw(random, 5, 12, 64)[:, :8]  # the q part of a q/k/v projection
    keys, values = draw(random, 3, 2, 50, 64)[1], draw(random, 3, 2, 50, 64)[1]
    with forced("triton"):
        found = attend_visible(q, keys, values, visible)
    assert_close(found, dense(q, keys, values, visible), ulps=2)


def test_visibility_is_read_when_the_kernel_runs():
    """The same tensors with other content, as in a replayed graph."""
    visible = block_visibility(integers([20]), integers([0, 0]), 10, 3)
    q, keys, values = draw(seeded(1), 6, 4, 64), draw(seeded(2), 2, 60, 64), draw(seeded(3), 2, 60, 64)
    longer = block_visibility(integers([33]), integers([5, 2]), 10, 3)
    visible.limits.copy_(longer.limits)
    visible.spans.copy_(longer.spans)
    for backend in ("triton", "reference"):
        with forced(backend):
            assert_close(attend_visible(q, keys, values, visible), dense(q, keys, values, longer), ulps=4)


def test_block_visibility_is_causal_within_a_text_and_shares_the_prefix():
    mask = block_visibility(torch.tensor([4]), torch.tensor([0, 2]), 5, 2).mask(14)
    seen = [set(row.nonzero()[:, 0].tolist()) for row in mask]
    prefix = {0, 1, 2, 3}
    assert seen == [prefix | {4}, prefix | {4, 5}, prefix | {9, 10, 11}, prefix | {9, 10, 11, 12}]


def test_waypoint_visibility_is_the_prefix_the_own_text_and_the_own_waypoints():
    texts = torch.tensor([[3, 5], [5, 5]])
    whole = waypoint_visibility(torch.tensor([3]), texts, torch.tensor([6]), 2).mask(10)
    causal = waypoint_visibility(torch.tensor([3]), texts, torch.tensor([6]), 2, causal=True).mask(10)
    seen, earlier = ([set(row.nonzero()[:, 0].tolist()) for row in mask] for mask in (whole, causal))
    assert seen == [{0, 1, 2, 3, 4, 6, 7}] * 2 + [{0, 1, 2, 8, 9}] * 2
    assert earlier == [{0, 1, 2, 3, 4, 6}, {0, 1, 2, 3, 4, 6, 7}, {0, 1, 2, 8}, {0, 1, 2, 8, 9}]


def test_stretches_that_touch_the_prefix_need_no_span():
    one = waypoint_visibility(torch.tensor([5]), torch.tensor([[5, 8]]), torch.tensor([8]), 3)
    assert one.limits.tolist() == [11, 11, 11]
    assert not one.spans.any()
    gap = waypoint_visibility(torch.tensor([5]), torch.tensor([[5, 8]]), torch.tensor([9]), 2)
    assert gap.limits.tolist() == [8, 8]
    assert gap.spans.tolist() == [[[0, 0], [9, 11]]] * 2


def test_slots_behind_the_cache_are_not_read():
    visible = Visible(*(integers(n).int() for n in ([90, 3], [[[0, 0]], [[50, 99]]])))
    q, keys, values = draw(seeded(1), 2, 4, 64), draw(seeded(2), 2, 60, 64), draw(seeded(3), 2, 60, 64)
    with forced("triton"):
        found = attend_visible(q, keys, values, visible)
    assert_close(found, dense(q, keys, values, visible), ulps=2)


def test_bad_input_is_refused():
    visible = up_to(torch.arange(5))
    q, keys = torch.zeros(5, 4, 16), torch.zeros(2, 9, 16)
    with pytest.raises(ValueError, match=r"visibility of T queries are required, found .* 5 queries"):
        attend_visible(q[:4], keys, keys, visible)
    with pytest.raises(ValueError, match="heads a multiple of kv_heads"):
        attend_visible(q[:, :3], keys, keys, visible)
    with pytest.raises(ValueError, match="laid out alike"):
        attend_visible(q, keys, keys.transpose(0, 1).contiguous().transpose(0, 1), visible)
    with pytest.raises(ValueError, match=r"spans \[T, 0..2, 2\] are required"):
        dataclasses.replace(visible, spans=torch.zeros(4, 1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="limits must be contiguous int32"):
        dataclasses.replace(visible, limits=torch.arange(5))
