"""Streams: what is exact is compared exactly with windows from scratch, what is approximate with its definition."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdrive_node.engine.stream import Stream, StreamSettings
from flashdrive_node.model.attention import attend, group_mask
from flashdrive_node.model.rope import mrope_cos_sin, rotate
from support.stream_windows import NAV, Window, drive, features_of, from_scratch, state, stream_model, tick

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# float32, sums of some hundred terms in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ROOM = 40


@QUICK
@given(seed=st.integers(0, 9999), mode=st.sampled_from(["full", "features"]))
def test_exact_modes_end_where_a_fresh_window_would(seed, mode):
    """Ticks, repeats, gaps, navigation, resets, lost cameras: always bit for bit the plain path's keys and values."""
    stream = Stream(stream_model(seed % 4), StreamSettings(mode), ROOM)
    for window in drive(seed, 8):
        if window is None:
            stream.reset()
            continue
        context, logits, plan = tick(stream, window)
        expected = from_scratch(stream, window)
        # The last layer runs for the last token alone, which sums in another order.
        torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-5)
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
        assert len(plan.rows.slots) < context.prefix
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
        if len(plan.rows.slots) < context.prefix:
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
        context, logits, plan = tick(stream, window)
        keys, values = state(context)
        slots = plan.rows.slots
        if len(slots) < context.prefix:
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
        computed, place = set(slots.tolist()), 0
        assert stream._keys is not None
        for image in plan.prompt.images:
            if image.start in computed:
                frame = (image.camera_index, window.stamps[image.camera_index][image.frame])
                places = slice(place, place + image.count)
                unrotated[frame] = [kept[:, places].transpose(0, 1).clone() for kept in stream._keys]
                values_of[frame] = [values[i][:, image.start : image.end].clone() for i in range(len(keys))]
            place += image.count
