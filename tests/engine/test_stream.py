"""Streams: what is exact is compared exactly with windows from scratch, what is approximate with its definition."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdrive_node.engine.stream import Stream, StreamSettings
from flashdrive_node.engine.window_plan import match_frames
from flashdrive_node.model import inference
from flashdrive_node.model.attention import attend, group_mask
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.prompt import ImageSpan
from flashdrive_node.model.rope import mrope_cos_sin, rotate
from support.stream_windows import Window, features_of, state, stream_model, tick

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# float32, sums of some hundred terms in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROOM = 40
NAV = [None, "Turn left in 30m", "Turn right onto a long street in 120m, then keep right"]


def drive(seed: int, ticks: int, cameras: list[int] | None = None, frames: int = 4) -> Iterator[Window | None]:
    """Windows of a drive with everything that happens to streams; None is a reset."""
    draw = random.Random(seed)
    cameras = cameras or sorted(draw.sample(range(7), draw.choice([1, 2, 3, 4, 7])))
    stamps = {camera: tuple(100 * (i + 1) + camera for i in range(frames)) for camera in cameras}
    window = Window(stamps)
    for k in range(ticks):
        yield window
        if draw.random() < 0.1:
            yield None
        nav = draw.choice(NAV) if draw.random() < 0.3 else window.nav_text
        stamps = {}
        event = draw.random()
        for camera, old in window.stamps.items():
            # Mostly one frame, after missed ticks more, each camera on its own now and then; or none, or a gap.
            new = draw.choice([1, 1, 1, 2, 3, 4]) if event < 0.7 else draw.choice([0, 1, 2]) if event < 0.9 else 0
            last = old[-1] + (5000 if event > 0.95 else 0)
            kept = () if event > 0.95 else old
            new = frames if event > 0.95 else new
            stamps[camera] = (*kept, *(last + 100 * (i + 1) for i in range(new)))[-frames:]
        if draw.random() < 0.08 and len(stamps) > 1:
            stamps.pop(draw.choice(sorted(stamps)))
        elif draw.random() < 0.08 and (absent := set(cameras) - set(stamps)):
            camera = min(absent)
            stamps[camera] = tuple(next(iter(stamps.values()))[i] + camera for i in range(frames))
        window = Window(stamps, nav, k + 1)


def from_scratch(stream: Stream, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, keys and values of the model's plain path."""
    model = stream.model
    prompt = window.prompt(model)
    features = features_of(model, window, prompt, range(len(prompt.images)))
    cache = inference.new_cache(model, len(prompt.ids), 1, 1)
    ids = window.ids(model, prompt)
    context, logits = inference.prefill(
        model, ids, prompt.positions, prompt.rope_delta, cache, features, prompt.image_index
    )
    return logits, *state(context)


@QUICK
@given(seed=st.integers(0, 9999), mode=st.sampled_from(["full", "features"]))
def test_exact_modes_end_where_a_fresh_window_would(seed, mode):
    """Ticks, repeats, gaps, navigation, resets, lost cameras: always bit for bit the plain path's state."""
    stream = Stream(stream_model(seed % 4), StreamSettings(mode), ROOM)
    for window in drive(seed, 8):
        if window is None:
            stream.reset()
            continue
        context, logits, plan = tick(stream, window)
        expected = from_scratch(stream, window)
        assert torch.equal(logits, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(state(context), expected[1:], strict=True))
        assert context.cache.used == context.prefix == len(plan.prompt.ids)


@QUICK
@given(seed=st.integers(0, 9999))
def test_kv_with_every_frame_refreshed_equals_full(seed):
    stream = Stream(stream_model(seed % 4), StreamSettings("kv", refresh_every=1), ROOM)
    for window in drive(seed, 6):
        if window is None:
            stream.reset()
            continue
        context, logits, _ = tick(stream, window)
        expected = from_scratch(stream, window)
        torch.testing.assert_close((logits, *state(context)), expected, **CLOSE)


@QUICK
@given(seed=st.integers(0, 9999), cameras=st.integers(1, 4), changed=st.integers(0, 3))
def test_kv_is_exact_where_nothing_in_front_of_kept_frames_changed(seed, cameras, changed):
    """The last cameras all new (or none), other history, text coming and going: kept cameras are in front of it all."""
    draw = random.Random(seed)
    stream = Stream(stream_model(seed % 4), StreamSettings("kv"), ROOM)
    window = Window(dict.fromkeys(sorted(draw.sample(range(7), cameras)), (1, 2, 3, 4)))
    tick(stream, window)
    for k in range(1, 4):
        new = sorted(window.stamps)[max(cameras - changed, 1) :]
        stamps = window.stamps | {camera: tuple(range(10 * k, 10 * k + 4)) for camera in new}
        window = Window(stamps, draw.choice(NAV), k)
        context, logits, plan = tick(stream, window)
        assert plan.rows is not None
        assert len(plan.encode) == 4 * len(new)
        torch.testing.assert_close((logits, *state(context)), from_scratch(stream, window), **CLOSE)


@QUICK
@given(seed=st.integers(0, 9999), refresh_views=st.booleans())
def test_first_layer_and_all_text_of_kv_are_always_exact(seed, refresh_views):
    """Layer 0 looks at nothing but its own token, so whatever was kept, moved and rotated must be what full gives."""
    stream = Stream(stream_model(seed % 4), StreamSettings("kv", refresh_views=refresh_views), ROOM)
    for window in drive(seed, 10):
        if window is None:
            stream.reset()
            continue
        context, logits, plan = tick(stream, window)
        _, keys, values = from_scratch(stream, window)
        found_keys, found_values = state(context)
        torch.testing.assert_close(found_keys[0], keys[0], **CLOSE)
        torch.testing.assert_close(found_values[0], values[0], **CLOSE)
        assert bool(logits.isfinite().all())
        if plan.rows is not None:
            # Everything but image tokens is computed anew, behind the constant start.
            images = torch.zeros(context.prefix, dtype=torch.bool)
            images[plan.image_index] = True
            text = (~images).nonzero()[:, 0]
            text = text[text > plan.prompt.images[0].start]
            assert set(text.tolist()) <= set(plan.rows.slots.tolist())


def dense(stream: Stream, window: Window, before: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows computed under one dense mask over kept keys and values: the definition of the approximation."""
    model = stream.model
    prompt = window.prompt(model)
    features = features_of(model, window, prompt, range(len(prompt.images)))
    assert features is not None
    hidden = model.language.embed_tokens.weight[window.ids(model, prompt)].clone()
    hidden[prompt.image_index] = features.embeds
    x, (keys, values) = hidden[rows], (t.clone() for t in before)
    cos, sin = mrope_cos_sin(prompt.positions[:, rows], model.config.text, x.dtype)
    mask = torch.arange(len(prompt.ids))[None, :] <= rows[:, None]
    mask = group_mask(mask, model.config.text.group_size, x.dtype)
    for i, layer in enumerate(model.language.layers):
        q, k, v = layer.project(x)
        keys[i][:, rows] = rotate(k, cos, sin).transpose(0, 1)
        values[i][:, rows] = v.transpose(0, 1)
        x = layer.finish(x, attend(rotate(q, cos, sin), keys[i], values[i], mask))
        if i < len(features.deepstack):
            whole = torch.zeros_like(hidden)
            whole[prompt.image_index] = features.deepstack[i]
            x = x + whole[rows]
    return model.language.logits(model.language.norm(x[-1:])), keys, values


@QUICK
@given(seed=st.integers(0, 9999), refresh_views=st.booleans())
def test_kv_equals_a_dense_mask_over_what_is_kept(seed, refresh_views):
    """Every window of kv, against rows under a dense mask on the last window's entries, moved frame by frame."""
    stream = Stream(stream_model(seed % 4), StreamSettings("kv", refresh_views=refresh_views), ROOM)
    unrotated: dict[tuple[int, int], list[Tensor]] = {}  # per frame and layer, keys of the window that computed them
    values_of: dict[tuple[int, int], list[Tensor]] = {}
    for window in drive(seed, 7):
        if window is None:
            stream.reset()
            continue
        pre_rope: dict[int, Tensor] = {}

        def observe(name: str, value: Tensor, pre_rope: dict[int, Tensor] = pre_rope) -> None:
            if name.startswith("k_pre_rope."):
                pre_rope[int(name.split(".")[1])] = value.clone()

        context, logits, plan = tick(stream, window, observe)
        keys, values = state(context)
        slots = torch.arange(context.prefix) if plan.rows is None else plan.rows.slots
        if plan.rows is not None:
            before = keys.clone(), values.clone()
            for image in plan.prompt.images:
                span = torch.arange(image.start, image.end)
                if bool(torch.isin(span, slots).any()):
                    continue
                frame = (image.camera_index, window.stamps[image.camera_index][image.frame])
                cos, sin = mrope_cos_sin(plan.prompt.positions[:, span], stream.model.config.text, torch.float32)
                for i in range(len(keys)):
                    before[0][i][:, span] = rotate(unrotated[frame][i], cos, sin).transpose(0, 1)
                    before[1][i][:, span] = values_of[frame][i]
            expected = dense(stream, window, before, slots)
            torch.testing.assert_close((logits, keys, values), expected, **CLOSE)
        row_of = {int(slot): row for row, slot in enumerate(slots)}
        for image in plan.prompt.images:
            if image.start in row_of:
                rows = [row_of[slot] for slot in range(image.start, image.end)]
                frame = (image.camera_index, window.stamps[image.camera_index][image.frame])
                unrotated[frame] = [pre_rope[i][rows] for i in range(len(keys))]
                values_of[frame] = [values[i][:, image.start : image.end].clone() for i in range(len(keys))]


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


def test_what_a_tick_computes():
    """New frames are encoded and computed, text is computed, kept frames are not touched; a gap starts anew."""
    stream = Stream(stream_model(0), StreamSettings("kv"), ROOM)
    window = Window({0: (1, 2, 3, 4), 2: (1, 2, 3, 4)})
    assert tick(stream, window)[2].encode == tuple(range(8))
    whole = 2 * 4 * 4  # two cameras, four frames, 2 x 2 image tokens each

    def computed(stamps: tuple[int, ...], other: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], int | None]:
        plan = tick(stream, Window({0: stamps, 2: other or stamps}))[2]
        if plan.rows is None:
            return plan.encode, None
        return plan.encode, len(plan.rows.image_tokens)

    assert computed((1, 2, 3, 4)) == ((), 0)
    assert computed((2, 3, 4, 5)) == ((3, 7), 8)
    assert computed((4, 5, 6, 7)) == ((2, 3, 6, 7), 16)
    assert computed((4, 5, 6, 7), (5, 6, 7, 8)) == ((7,), 4)
    assert computed((5, 6, 7, 8), (105, 106, 107, 108)) == ((3, 4, 5, 6, 7), 20)
    assert computed((201, 202, 203, 204)) == (tuple(range(8)), None)
    # A frame between two that are there already comes late: the older one moves, the newer ones stay.
    assert computed((200, 202, 203, 204)) == ((0, 4), 8)
    stream.reset()
    assert computed((200, 202, 203, 204)) == (tuple(range(8)), None)
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
        stream._move(plan, context.cache)
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
    with pytest.raises(RuntimeError):
        stream.prefill(plan, prompt.ids.float(), later.rows, features_of(stream.model, later, prompt, plan.encode))
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
