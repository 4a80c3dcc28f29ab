"""Decoding and acting on random models: against one full forward and single runs; stop rules and guidance."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashdrive_node.model import inference
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.inference import Context, Generated, StopRule
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.model.vision import VisionFeatures
from support.small_models import random_model, small_config

CONFIG = small_config(layers=2, waypoints=5, deepstack=[1])
STOP, END, PAD = CONFIG.tokens.future_start, 2, 0
RULE = StopRule(STOP, END, PAD, (CONFIG.tokens.traj_token_start, CONFIG.tokens.traj_vocab_size))
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# float32, sums of at most some hundred terms in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def start(model: Alpamayo, prompt: int, rows: int, max_length: int, seed: int) -> tuple[Context, torch.Tensor]:
    """A context of random text with one image of four tokens in front, and a rope delta that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, 100, (prompt,), generator=generator)
    hidden = model.config.text.hidden_size
    features = VisionFeatures(
        torch.randn(4, hidden, generator=generator), [torch.randn(4, hidden, generator=generator)]
    )
    cache = inference.new_cache(model, prompt, rows, max_length)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)  # whoever looks at an unwritten slot gets NaN
    positions = torch.arange(prompt).expand(3, -1)
    return inference.prefill(model, ids, positions, -2, cache, features, torch.arange(1, 5))


def with_texts(model: Alpamayo, scripts: list[list[int]], prompt: int, seed: int) -> tuple[Context, Generated]:
    longest = max(len(s) for s in scripts)
    script = torch.tensor([s + [PAD] * (longest - len(s)) for s in scripts])
    context, logits = start(model, prompt, len(scripts), longest + 2, seed)
    sampling = SamplingSettings(top_k=1, max_length=longest + 2)
    return context, inference.decode(model, context, logits, len(scripts), sampling, RULE, script=script)


texts = st.lists(st.integers(7, 100), min_size=0, max_size=6).map(lambda t: [*t, STOP])


@SLOW
@given(scripts=st.lists(texts, min_size=1, max_size=4), prompt=st.integers(6, 30), seed=st.integers(0, 999))
def test_rows_of_a_shared_prefix_equal_single_runs(scripts, prompt, seed):
    """Texts of different length from one prefix: every row's velocity is that of a run of its own."""
    model = random_model(CONFIG, seed)
    waypoints = CONFIG.action_space.n_waypoints
    x = torch.randn(len(scripts), waypoints, 2, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor(0.3)
    context, text = with_texts(model, scripts, prompt, seed)
    assert text.rows() == scripts
    assert all(text.stopped)
    together = inference.velocity_field(model, context, text)(x, t)
    assert bool(together.isfinite().all())
    for row, script in enumerate(scripts):
        alone = inference.velocity_field(model, *with_texts(model, [script], prompt, seed))(x[row : row + 1], t)
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


@SLOW
@given(rows=st.integers(1, 3), prompt=st.integers(6, 20), length=st.integers(1, 6), seed=st.integers(0, 999))
def test_logits_equal_one_full_forward(rows, prompt, length, seed):
    """Tokens drawn one by one see what a forward over the finished sequence sees."""
    model = random_model(CONFIG, seed)
    context, logits = start(model, prompt, rows, length, seed)
    generator = torch.Generator().manual_seed(seed)
    recorded = []

    def observe(name, value):
        if name == "logits_masked":
            recorded.append(value.clone())

    rule = StopRule(stop=None, end_of_turn=-1, pad=PAD)
    sampling = SamplingSettings(temperature=1.5, max_length=length)
    text = inference.decode(model, context, logits, rows, sampling, rule, generator, observe=observe)
    assert text.lengths == (length,) * rows
    assert text.stopped == (False,) * rows
    assert context.cache.used == prompt + rows * (length - 1)
    for row in range(rows):
        again, first = start(model, prompt, 1, length, seed)
        expected = [first]
        if length > 1:
            step = torch.arange(length - 1)
            positions = (prompt + step - 2).expand(3, -1)
            mask = torch.cat((torch.ones(length - 1, prompt, dtype=torch.bool), step[None, :] <= step[:, None]), dim=1)
            hidden = model.language(text.tokens[row, :-1], positions, again.cache, mask)
            expected.append(model.language.logits(hidden))
        found = torch.stack([r[row] for r in recorded])
        torch.testing.assert_close(found, torch.cat(expected), **CLOSE)


@SLOW
@given(
    scripts=st.lists(texts, min_size=1, max_size=3),
    prompt=st.integers(8, 20),
    nav=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_guidance_context_equals_a_prompt_of_its_own(scripts, prompt, nav, seed):
    """Copied prefix + tail + texts in one pass = the bare prompt prefilled anew and the texts decoded behind it."""
    model = random_model(CONFIG, seed)
    context, text = with_texts(model, scripts, prompt + nav, seed)
    shared = prompt - 3  # the last three tokens stand behind the navigation text
    ids = torch.randint(7, 100, (3,), generator=torch.Generator().manual_seed(seed + 1))
    bare_ids = torch.cat((torch.zeros(shared, dtype=torch.int64), ids))
    positions = torch.arange(prompt).expand(3, -1)
    second, _ = inference.prefill_without_navigation(model, context, bare_ids, positions, -2, shared, len(scripts))
    hidden = inference.repeat_text(model, second, text)
    assert hidden.shape[:2] == (max(text.lengths), len(scripts))

    again = inference.new_cache(model, prompt, len(scripts), max(text.lengths) + 2)
    again.copy_prefix(context.cache, shared)
    for i in range(3):
        model.language(ids[i : i + 1], positions[:, shared + i : shared + i + 1], again)
    expected_context = Context(again, prompt, -2)
    script = torch.tensor([row + [PAD] * (max(text.lengths) - len(row)) for row in text.rows()])
    sampling = SamplingSettings(top_k=1, max_length=max(text.lengths) + 2)
    logits = torch.zeros(1, CONFIG.tokens.vocab_size)
    expected_text = inference.decode(model, expected_context, logits, len(scripts), sampling, RULE, script=script)
    x = torch.randn(len(scripts), CONFIG.action_space.n_waypoints, 2, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor(0.7)
    found = inference.velocity_field(model, second, text)(x, t)
    expected = inference.velocity_field(model, expected_context, expected_text)(x, t)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_ways_to_end():
    model = random_model(CONFIG, 0)

    def end(script: list[list[int]], max_length: int) -> tuple[Context, Generated]:
        context, logits = start(model, 8, len(script), max_length, 0)
        sampling = SamplingSettings(top_k=1, max_length=max_length)
        tokens = torch.tensor(script)
        return context, inference.decode(model, context, logits, len(script), sampling, RULE, script=tokens)

    # The stop token's own cache entry is there, because the expert attends to it.
    context, text = end([[9, 9, STOP]], 10)
    assert (text.lengths, text.stopped, context.cache.used) == ((3,), (True,), 8 + 3)
    # Cut by the length limit: the last token counts for the positions but has no entry, as in the reference.
    context, text = end([[9, 9, 9]], 3)
    assert (text.lengths, text.stopped, context.cache.used) == ((3,), (False,), 8 + 2)
    # The stop token as the last one allowed is not run either.
    context, text = end([[9, 9, STOP]], 3)
    assert (text.lengths, text.stopped, context.cache.used) == ((3,), (True,), 8 + 2)
    # End of turn ends a row without a stop; it is fed padding while another row goes on.
    context, text = end([[9, END, 50, 50], [9, 9, 9, STOP]], 10)
    assert (text.lengths, text.stopped) == ((2, 4), (False, True))
    assert text.tokens[0].tolist() == [9, END, PAD, PAD]
    context, text = end([[9, END]], 10)
    assert (text.lengths, text.stopped, context.cache.used) == ((2,), (False,), 8 + 1)


def test_trajectory_tokens_are_never_drawn():
    config = small_config(layers=1, waypoints=5, deepstack=[])
    model = random_model(config, 1)
    first, count = config.tokens.traj_token_start, config.tokens.traj_vocab_size
    model.language.lm_head.weight[first : first + count] *= 50  # far likelier than anything else
    cache = inference.new_cache(model, 4, 2, 12)
    ids = torch.arange(10, 14)
    features = VisionFeatures(torch.zeros(0, config.text.hidden_size), [])
    context, logits = inference.prefill(
        model, ids, torch.arange(4).expand(3, -1), 0, cache, features, torch.zeros(0, dtype=torch.int64)
    )
    assert first <= int(logits.argmax()) < first + count
    rule = StopRule(config.tokens.future_start, END, PAD, (first, count))
    text = inference.decode(
        model, context, logits, 2, SamplingSettings(max_length=12), rule, torch.Generator().manual_seed(0)
    )
    assert not bool(((text.tokens >= first) & (text.tokens < first + count)).any())


def test_a_full_cache_says_so():
    model = random_model(CONFIG, 0)
    cache = KVCache(CONFIG.text, 3, "cpu", torch.float32)
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="the cache has 3 slots, 4 are needed"):
        model.language(ids, ids.expand(3, -1), cache)
