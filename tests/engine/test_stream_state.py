"""What a stream carries from window to window: memory, ageing, stale slots, resets, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdrive_node.engine.stream import Stream, StreamSettings
from flashdrive_node.engine.window_plan import match_frames
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.prompt import ImageSpan
from flashdrive_node.model.rope import mrope_cos_sin, rotate
from support.stream_windows import Window, drive, features_of, from_scratch, state, stream_model, tick

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROOM = 40


def poison(stream: Stream) -> None:
    """NaN wherever the stream may not look."""
    assert stream.cache is not None
    first = 0 if stream._stamps is None else stream.cache.used
    stream.cache.keys[:, :, first:] = torch.nan
    stream.cache.values[:, :, first:] = torch.nan
    if stream._stamps is None:
        for buffer in (stream._features, stream._keys):
            if buffer is not None:
                buffer.fill_(torch.nan)


@QUICK
@given(seed=st.integers(0, 9999), mode=st.sampled_from(["full", "features", "kv"]))
def test_unused_slots_are_never_seen(seed, mode):
    """NaN behind the prompt before every window, and everywhere after a reset, changes nothing."""
    stream, clean = (Stream(stream_model(seed % 4), StreamSettings(mode), ROOM) for _ in range(2))
    for window in drive(seed, 8):
        if window is None:
            stream.reset()
            clean.reset()
        else:
            _, logits, _ = tick(stream, window)
            assert torch.equal(logits, tick(clean, window)[1])
        poison(stream)


@QUICK
@given(seed=st.integers(0, 9999), mode=st.sampled_from(["features", "kv"]))
def test_streams_over_one_set_of_weights_do_not_affect_each_other(seed, mode):
    model = stream_model(seed % 4)
    together = [Stream(model, StreamSettings(mode), ROOM) for _ in range(2)]
    drives = [[w for w in drive(seed + i, 5) if w is not None] for i in range(2)]
    found: list[list[Tensor]] = [[], []]
    for pair in zip(*drives, strict=True):
        for i, window in enumerate(pair):
            found[i].append(tick(together[i], window)[1])
    for i in range(2):
        alone = Stream(model, StreamSettings(mode), ROOM)
        for window, logits in zip(drives[i], found[i], strict=True):
            assert torch.equal(tick(alone, window)[1], logits)


def test_memory_is_constant():
    """No buffer is allocated after the first window, whatever comes, as long as no camera is added."""
    stream = Stream(stream_model(0), StreamSettings("kv"), ROOM)
    seen = set()
    for window in drive(4, 150, [0, 1, 2, 6]):
        if window is None:
            stream.reset()
            continue
        tick(stream, window)
        assert stream.cache is not None
        assert stream._features is not None
        assert stream._keys is not None
        seen.add(tuple(t.data_ptr() for t in (stream.cache.keys, stream.cache.values, stream._features, stream._keys)))
    assert len(seen) == 1


def test_ten_thousand_ticks_leave_no_trace():
    """The same buffers, and the first layer of every window exactly that of a fresh one, to the last."""
    stream, buffers = Stream(stream_model(3), StreamSettings("kv"), ROOM), set()
    for k in range(10_000):
        window = Window({1: (k, k + 1, k + 2, k + 3)}, "Turn left in 30m" if k // 50 % 2 else None, k)
        context, _, plan = tick(stream, window)
        assert len(plan.encode) == (1 if k else 4)
        assert stream._keys is not None
        buffers.add(tuple(t.data_ptr() for t in (context.cache.keys, context.cache.values, stream._keys)))
    assert len(buffers) == 1
    _, keys, values = from_scratch(stream, window)
    torch.testing.assert_close([t[0] for t in state(context)], [keys[0], values[0]], rtol=1e-6, atol=1e-6)


def test_what_a_tick_computes():
    """New frames are encoded and computed, text is computed, kept frames are not touched; a gap starts anew."""
    stream = Stream(stream_model(0), StreamSettings("kv"), ROOM)
    window = Window({0: (1, 2, 3, 4), 2: (1, 2, 3, 4)})
    assert tick(stream, window)[2].encode == tuple(range(8))
    whole = 2 * 4 * 4  # two cameras, four frames, 2 x 2 image tokens each

    def computed(stamps: tuple[int, ...], other: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], int]:
        plan = tick(stream, Window({0: stamps, 2: other or stamps}))[2]
        return plan.encode, len(plan.rows.image_tokens)

    assert computed((1, 2, 3, 4)) == ((), 0)
    assert computed((2, 3, 4, 5)) == ((3, 7), 8)
    assert computed((4, 5, 6, 7)) == ((2, 3, 6, 7), 16)
    assert computed((4, 5, 6, 7), (5, 6, 7, 8)) == ((7,), 4)
    assert computed((5, 6, 7, 8), (105, 106, 107, 108)) == ((3, 4, 5, 6, 7), 20)
    assert computed((201, 202, 203, 204)) == (tuple(range(8)), whole)
    # A frame between two that are there already comes late: the older one moves, the newer ones stay.
    assert computed((200, 202, 203, 204)) == ((0, 4), 8)
    stream.reset()
    assert computed((200, 202, 203, 204)) == (tuple(range(8)), whole)
    assert whole == len(stream.plan(window.prompt(stream.model), window.rows).encode_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ageing_equals_a_fresh_rotation_after_any_number_of_slides(dtype):
    """1, 3 and 10,000 slides: kept keys are exactly what rotating them at their place gives, in both precisions."""
    model = stream_model(0, dtype)
    stream = Stream(model, StreamSettings("kv"), ROOM)
    context, _, _ = tick(stream, Window({0: (1, 2, 3, 4), 1: (1, 2, 3, 4)}))
    prompt = Window({0: (1, 2, 3, 4), 1: (1, 2, 3, 4)}).prompt(model)
    generator = torch.Generator().manual_seed(0)
    newest = [image for image in prompt.images if image.frame == 3]
    offsets = _offsets(prompt.images)
    originals = {image: stream._keys[:, :, _tokens(offsets, image)].clone() for image in prompt.images}
    for slide in range(1, 10_001):
        plan = stream.plan(prompt, [(slide + 1, slide + 2, slide + 3, slide + 4)] * 2)
        stream.age(plan)
        originals = {
            image: originals[prompt.images[i + 1]] for i, image in enumerate(prompt.images) if image.frame < 3
        } | {image: torch.randn(originals[image].shape, generator=generator).to(dtype) for image in newest}
        for image in newest:  # what the prefill would write
            tokens = _tokens(offsets, image)
            stream._keys[:, :, tokens] = originals[image]
        stream._stamps = ((slide + 1, slide + 2, slide + 3, slide + 4),) * 2
        if slide in (1, 3, 10_000):
            for image in prompt.images:
                if image.frame < 3:
                    span = slice(image.start, image.end)
                    cos, sin = mrope_cos_sin(prompt.positions[:, span], model.config.text, dtype)
                    for layer, keys in enumerate(originals[image]):
                        fresh = rotate(keys.transpose(0, 1), cos, sin).transpose(0, 1)
                        assert torch.equal(context.cache.keys[layer, :, span], fresh)


def _offsets(images: tuple[ImageSpan, ...]) -> dict[ImageSpan, int]:
    result, total = {}, 0
    for image in images:
        result[image] = total
        total += image.count
    return result


def _tokens(offsets: dict[ImageSpan, int], image: ImageSpan) -> slice:
    return slice(offsets[image], offsets[image] + image.count)


def test_a_failed_window_leaves_a_stream_as_after_a_reset():
    stream = Stream(stream_model(0), StreamSettings("kv"), ROOM)
    window, later = Window({1: (1, 2, 3, 4)}), Window({1: (2, 3, 4, 5)}, history=1)
    tick(stream, window)
    prompt = later.prompt(stream.model)
    plan = stream.plan(prompt, later.rows)
    features = features_of(stream.model, later, prompt, plan.encode)
    assert features is not None
    with pytest.raises((RuntimeError, IndexError)):
        stream.prefill(plan, prompt.ids, later.rows, features._replace(embeds=features.embeds[:, 1:]))
    context, logits, plan = tick(stream, later)
    assert plan.encode == (0, 1, 2, 3)
    torch.testing.assert_close((logits, *state(context)), from_scratch(stream, later), rtol=0, atol=0)


def test_frames_are_matched_by_stamp():
    assert match_frames(None, [(1, 2)]) == ((None, None),)
    assert match_frames([(1, 2, 3), (1, 2, 3)], [(2, 3, 4), (3, 4, 5)]) == ((1, 2, None), (2, None, None))
    assert match_frames([(5, 6)], [(4, 5)]) == ((None, 0),)


def test_bad_windows_are_refused():
    stream = Stream(stream_model(0), StreamSettings(), ROOM)
    prompt = Window({0: (1, 2, 3, 4), 1: (1, 2, 3, 4)}).prompt(stream.model)
    with pytest.raises(InputError, match=r"camera 1: ascending stamps are required, found \[1, 1, 2, 3\]"):
        stream.plan(prompt, [(1, 2, 3, 4), (1, 1, 2, 3)])
    with pytest.raises(InputError, match=r"stamps of 2 camera\(s\) x 4 frame\(s\) are required, found \[4\]"):
        stream.plan(prompt, [(1, 2, 3, 4)])
    with pytest.raises(InputError, match="mode must be one of"):
        StreamSettings("fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="refresh_every must be 0"):
        StreamSettings(refresh_every=-1)
