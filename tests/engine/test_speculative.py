"""Speculative decoding against one-at-a-time decoding: tokens, cache, what the expert sees, and distributions."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdrive_node.engine import speculative
from flashdrive_node.engine.draft_rule import DraftRule, Propose, Script, SkipRule, block_sizes
from flashdrive_node.engine.drafted_texts import Speculated
from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.drafter_config import DrafterConfig
from flashdrive_node.engine.flow_pass import SampledTexts, WaypointContext
from flashdrive_node.engine.speculative import TextDecoder
from flashdrive_node.engine.taps import Taps
from flashdrive_node.model import inference
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.inference import Context, Generated, StopRule
from flashdrive_node.model.sampling import SamplingSettings, filter_logits
from support.small_models import random_model, small_config

CONFIG = small_config(layers=2, waypoints=5, deepstack=[])
STOP, CLOSING, END, PAD = CONFIG.tokens.future_start, 16, 2, 0
RULE = StopRule(STOP, END, PAD, (CONFIG.tokens.traj_token_start, CONFIG.tokens.traj_vocab_size))
#: Tokens that a test's model can say, the likeliest of all by far.
WORDS = [10, 11, 12, 13, 14, 15]
LAYERS = (0, 1)
# float32, the same sums in blocks of another size.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def talking_model(seed: int, ends: float = 0.8) -> Alpamayo:
    """A model that says `WORDS` and the ways to end, the latter scaled by `ends`."""
    model = random_model(CONFIG, seed)
    head = model.language.lm_head.weight
    said = torch.zeros(len(head), 1)
    said[WORDS] = 1.0
    said[[STOP, CLOSING, END]] = ends
    head.mul_(said * 3)
    return model


class Prompted:
    """A prompt in a cache whose free slots hold NaN, from which texts are decoded again and again."""

    def __init__(self, model: Alpamayo, seed: int, rows: int, max_length: int, block: int, context_length: int):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(7, 100, (9,), generator=generator)
        self.model, slots = model, 9 + speculative.slots_needed(rows, SamplingSettings(max_length=max_length), block)
        cache = inference.KVCache(CONFIG.text, slots + rows * 5, "cpu", torch.float32)
        none = inference.VisionFeatures(torch.zeros(0, CONFIG.text.hidden_size), [])
        taps = Taps(LAYERS, context_length)
        self.context, self.logits = inference.prefill(
            model, ids, torch.arange(9).expand(3, -1), -2, cache, none, torch.zeros(0, dtype=torch.int64), taps.observe
        )
        self.states = taps.states()

    def clear(self) -> Context:
        """Forget everything behind the prompt."""
        cache = self.context.cache
        cache.used = self.context.prefix
        cache.keys[:, :, cache.used :] = torch.nan
        cache.values[:, :, cache.used :] = torch.nan
        return self.context

    def plain(self, settings: SamplingSettings, generator: torch.Generator | None = None) -> Generated:
        return inference.decode(self.model, self.clear(), self.logits, 1, settings, RULE, generator)

    def text_slots(self, end: int) -> tuple[Tensor, Tensor]:
        cache = self.context.cache
        return cache.keys[:, :, :end].clone(), cache.values[:, :, :end].clone()

    def decoder(
        self,
        propose: Propose | None,
        block: int,
        settings: SamplingSettings,
        rows: int = 1,
        closing: int | None = CLOSING,
        script: Script | None = None,
        skip: SkipRule | None = None,
        ahead: bool | None = None,
    ) -> TextDecoder:
        draft = None if propose is None else DraftRule(propose, LAYERS, block, len(self.states), closing, None, skip)
        return TextDecoder(
            self.model, self.context.cache, rows, settings, RULE, draft, script=script, guess_ahead=ahead
        )

    def speculate(
        self,
        propose: Propose | None,
        block: int,
        settings: SamplingSettings,
        rows: int = 1,
        generator: torch.Generator | None = None,
        skip: SkipRule | None = None,
    ) -> Speculated:
        decoder = self.decoder(propose, block, settings, rows, skip=skip)
        return decoder.decode(self.clear(), self.logits, self.states, generator)


def accepted(text: list[int], done: int, guesses: list[int]) -> int:
    """How many guesses behind `done` tokens are right; behind the closing token the stop token is guessed."""
    previous, count = [text[done - 1], *guesses], 0
    for before, guess, token in zip(previous, guesses, text[done:], strict=False):
        if (STOP if before == CLOSING else guess) != token:
            break
        count += 1
    return count


def guesser(text: list[int], block: int, right: Callable[[], bool], log: list) -> Propose:
    """Guesses the text's next tokens, each only where `right` says so; logs (tokens so far, guesses)."""

    def propose(known: Tensor, states: Tensor, place: Tensor) -> Tensor:
        assert bool(states.isfinite().all())
        done = 1
        if log:
            done = log[-1][0] + accepted(text, *log[-1]) + 1
        assert known.tolist() == [text[done - 1]]
        nexts = [*text[done : done + block - 1], *[WORDS[0]] * block][: block - 1]
        guesses = [token if right() else WORDS[(token + 1) % len(WORDS)] for token in nexts]
        log.append((done, guesses))
        return torch.tensor([guesses])

    return propose


def knowing(text: list[int], block: int) -> Propose:
    """Guesses what comes next in this text, from the place of the known token."""

    def propose(known: Tensor, states: Tensor, place: Tensor) -> Tensor:
        return torch.tensor([[*text[int(place) + 1 :], *[WORDS[0]] * block][: block - 1]])

    return propose


def unsteady(propose: Propose, block: int, seed: int) -> SkipRule:
    """A drafter that is sure of its guesses at random, so that blocks of all sizes are checked."""
    generator = torch.Generator().manual_seed(seed)

    def surely(known: Tensor, states: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        guesses = propose(known, states, place)
        return guesses, torch.rand(guesses.shape, generator=generator) ** 0.3

    return SkipRule(surely, block_sizes(block), 0.3)


def random_drafter(block: int, context_length: int, seed: int) -> Drafter:
    drafter = Drafter(DrafterConfig(CONFIG.text, LAYERS, block, context_length, 5000))
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*drafter.parameters(), drafter.mask_embedding):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return drafter.requires_grad_(False)


def way_to_end(text: list[int], log: list, block: int) -> str:
    """How a text came to its end, from the last guesses."""
    kind = {STOP: "stop", END: "end of turn"}.get(text[-1], "length limit")
    done, guesses = log[-1]
    if len(text) == 1:  # known to the host behind the first block only
        return f"{kind} as first token"
    count = accepted(text, done, guesses)
    if done + count >= len(text):
        return f"{kind} inside a block"
    return f"{kind} as bonus after a {'full' if count == block - 1 else 'partial'} block"


def test_greedy_text_and_cache_equal_one_at_a_time_decoding():
    """Thousands of texts, with drafters that are always right, never, sometimes, and random networks."""
    draw, ways, cases = random.Random(0), Counter(), 0
    for seed in range(60):
        model = talking_model(seed, draw.choice([0.5, 0.8, 1.0, 1.3]))
        for _ in range(2):
            block, context_length = draw.randint(2, 8), draw.randint(1, 4)
            prompted = Prompted(model, draw.randrange(9999), 1, 16, block, context_length)
            network = random_drafter(block, context_length, seed)
            for max_length in draw.sample(range(1, 17), 3):
                greedy = SamplingSettings(temperature=0, max_length=max_length)
                expected = prompted.plain(greedy)
                text, used = expected.rows()[0], prompted.context.cache.used
                keys, values = prompted.text_slots(used)
                drafters = {
                    "right": lambda: True,
                    "wrong": lambda: False,
                    "mixed": lambda: draw.random() < 0.7,
                    "often right": lambda: draw.random() < 0.9,
                    "network": None,
                    "none": None,
                }
                for name, right in drafters.items():
                    log: list[tuple[int, list[int]]] = []
                    if name == "none":
                        propose = None
                    elif right is None:
                        propose = lambda known, states, place: network.propose(model.language, known, states, None)  # noqa: E731, B023
                    else:
                        propose = guesser(text, block, right, log)
                    found = prompted.speculate(propose, block, greedy)
                    assert found.text.rows() == [text], (seed, name)
                    assert (found.text.lengths, found.text.stopped) == (expected.lengths, expected.stopped)
                    assert found.slots == (used - prompted.context.prefix,)
                    found_keys, found_values = prompted.text_slots(used)
                    torch.testing.assert_close(found_keys, keys, **CLOSE)
                    torch.testing.assert_close(found_values, values, **CLOSE)
                    if right is not None:
                        assert found.rounds == len(log)
                        ways[way_to_end(text, log, block)] += 1
                    if name == "right" and CLOSING not in text:
                        assert found.rounds == max(-(-(len(text) - 1) // block), 1)
                    if name == "none" or (name == "wrong" and CLOSING not in text):
                        assert found.rounds == max(len(text) - 1, 1)
                    cases += 1
                    # Labels: the first token is the model's own, and so is the last of every block that is looked at.
                    (labels,) = found.routine
                    assert len(labels) == len(text)
                    assert not labels[0]
                    if name == "none":
                        assert not any(labels)
                    if name == "right" and CLOSING not in text:
                        assert [not label for label in labels] == [i % block == 0 for i in range(len(text))]
                by_place = knowing(text, block)
                skipped = prompted.speculate(by_place, block, greedy, skip=unsteady(by_place, block, seed))
                assert skipped.text.rows() == [text]
                assert skipped.slots == (used - prompted.context.prefix,)
                for found_slots, slots in zip(prompted.text_slots(used), (keys, values), strict=True):
                    torch.testing.assert_close(found_slots, slots, **CLOSE)
    assert cases >= 2000
    for kind in ("stop", "end of turn", "length limit"):
        for place in ("inside a block", "as bonus after a full block", "as bonus after a partial block"):
            assert ways[f"{kind} {place}"] >= 5, ways
        assert ways[f"{kind} as first token"] >= 5, ways


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.integers(1, 3), block=st.integers(2, 6), seed=st.integers(0, 9999), chance=st.floats(0, 1))
def test_expert_sees_what_one_at_a_time_decoding_leaves(rows, block, seed, chance):
    """Rows lie behind each other; each row's velocity is that of its text decoded alone."""
    model, draw = talking_model(seed), random.Random(seed)
    prompted = Prompted(model, seed, rows, 10, block, 2)
    sampling = SamplingSettings(temperature=1.5, max_length=10)
    generator = torch.Generator().manual_seed(seed)
    random_guesses = lambda known, states, place: torch.tensor(  # noqa: E731
        [[draw.choice([*WORDS, CLOSING]) for _ in range(block - 1)] for _ in known]
    )
    decoder = prompted.decoder(random_guesses, block, sampling, rows)
    found = decoder.decode(prompted.clear(), prompted.logits, prompted.states, generator)
    first, end = decoder.stretches(prompted.context)
    waypoints = WaypointContext(model, prompted.context.cache, rows)
    waypoints.place(
        prompted.context, SampledTexts(tuple(zip(first, found.slots, strict=True)), found.text.lengths, end)
    )
    x = torch.randn(rows, 5, 2, generator=generator)
    t = torch.tensor(0.4)
    together = waypoints.velocity()(x, model.expert.action_in_proj.time_part(t[None])[0])
    assert bool(together.isfinite().all())
    for row, script in enumerate(found.text.rows()):
        alone = inference.decode(
            model, prompted.clear(), prompted.logits, 1, sampling, RULE, script=torch.tensor([script])
        )
        assert alone.rows() == [script]
        expected = inference.velocity_field(model, prompted.context, alone)(x[row : row + 1], t)
        torch.testing.assert_close(together[row : row + 1], expected, **CLOSE)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.integers(1, 3), block=st.integers(2, 6), seed=st.integers(0, 9999), skips=st.booleans())
def test_guessing_ahead_changes_nothing(rows, block, seed, skips):
    """A block more is guessed behind the texts' end, unless all of them were about to end."""
    model = talking_model(seed)
    prompted = Prompted(model, seed, rows, 10, block, 2)
    sampling = SamplingSettings(temperature=1.2, max_length=10)
    found, slots, guessed = [], [], []
    for ahead in (False, True):
        draw, blocks = random.Random(seed), [0]

        def propose(known: Tensor, states: Tensor, place: Tensor, draw=draw, blocks=blocks) -> Tensor:
            blocks[0] += 1
            return torch.tensor([[draw.choice([*WORDS, CLOSING]) for _ in range(block - 1)] for _ in known])

        skip = unsteady(propose, block, seed) if skips else None
        decoder = prompted.decoder(propose, block, sampling, rows, skip=skip, ahead=ahead)
        generator = torch.Generator().manual_seed(seed)
        said = decoder.decode(prompted.clear(), prompted.logits, prompted.states, generator)
        found.append((said.text.rows(), said.slots, said.rounds, said.blocks, said.routine))
        first, _ = decoder.stretches(prompted.context)
        cache = prompted.context.cache
        slots.append([cache.keys[:, :, a : a + n].clone() for a, n in zip(first, said.slots, strict=True)])
        guessed.append(blocks[0] - said.rounds)
    assert found[0] == found[1]
    assert guessed in ([0, 0], [0, 1])
    for a, b in zip(*slots, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_text_that_closes_inside_a_block_takes_no_further_pass(ahead):
    """A script like the benchmark's: three rounds of five tokens, the stop token guessed behind the closing one."""
    model = talking_model(1)
    prompted = Prompted(model, 1, 1, 17, 8, 1)
    script = Script(torch.tensor([[WORDS[0]] * 14 + [CLOSING, STOP]]), gain=5)
    passes: list[str] = []
    greedy = SamplingSettings(temperature=0, max_length=17)
    decoder = prompted.decoder(knowing([], 8), 8, greedy, script=script, ahead=ahead)
    run = decoder.graphs.run
    decoder.graphs.run = lambda key, function: (passes.append(key[1]), run(key, function))[1]  # type: ignore[method-assign]
    found = decoder.decode(prompted.clear(), prompted.logits, prompted.states)
    assert found.text.rows() == script.tokens.tolist()
    assert (found.rounds, found.slots) == (3, (16,))
    assert passes == ["first token", *["guess", "check"] * 3]


def exact_probabilities(prompted: Prompted, settings: SamplingSettings) -> dict[tuple[int, ...], float]:
    """Every text that can be drawn and its probability, token by token with the plain model."""
    texts: dict[tuple[int, ...], float] = {}

    def follow(text: tuple[int, ...], probability: float) -> None:
        if text and (text[-1] in (STOP, END) or len(text) == settings.max_length):
            texts[text] = probability
            return
        context, logits = prompted.clear(), prompted.logits
        for i, token in enumerate(text):
            position = torch.full((3, 1), context.prefix + i + context.rope_delta)
            hidden = prompted.model.language(torch.tensor([token]), position, context.cache)
            logits = prompted.model.language.logits(hidden)
        chances = filter_logits(speculative.forbid(logits.clone(), RULE), settings).softmax(dim=-1)[0]
        for token in chances.nonzero()[:, 0].tolist():
            follow((*text, token), probability * float(chances[token]))

    follow((), 1.0)
    return texts


@pytest.mark.parametrize(
    ("drafter", "rows", "skips"),
    [("likely", 1, False), ("unlikely", 1, False), ("likely", 3, False), ("likely", 2, True)],
)
def test_sampled_texts_have_the_models_distribution(drafter, rows, skips):
    """Chi-square of 700 texts against exact probabilities; the drafter always guesses the same."""
    model = talking_model(5, ends=1.0)
    sampling = SamplingSettings(temperature=1.3, top_p=0.95, top_k=3, max_length=3)
    prompted = Prompted(model, 3, rows, 3, 3, 1)
    exact = exact_probabilities(prompted, sampling)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    assert len(exact) >= 10
    ranked = sorted(exact, key=lambda text: exact[text])
    text = list(ranked[-1] if drafter == "likely" else ranked[0])

    def propose(known: Tensor, states: Tensor, place: Tensor) -> Tensor:
        done = [text.index(token) + 1 if token in text else len(text) for token in known.tolist()]
        return torch.tensor([[*text[n:], 10, 10][:2] for n in done])

    generator, runs, counts = torch.Generator().manual_seed(7), 700, Counter()
    while counts.total() < runs:
        skip = unsteady(propose, 3, counts.total()) if skips else None
        found = prompted.speculate(propose, 3, sampling, rows, generator, skip)
        counts.update(tuple(row) for row in found.text.rows())
    assert counts.keys() <= exact.keys()
    expected = {key: counts.total() * p for key, p in exact.items()}
    # Rare texts share one class.
    rare = [key for key, n in expected.items() if n < 8]
    classes = [(counts[key], n) for key, n in expected.items() if n >= 8]
    if rare:
        classes.append((sum(counts[key] for key in rare), sum(expected[key] for key in rare)))
    freedom = len(classes) - 1
    statistic = sum((seen - n) ** 2 / n for seen, n in classes)
    assert freedom >= 5
    # Normal approximation of chi-square (Wilson-Hilferty), four standard deviations.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 4, (statistic, freedom)


def test_a_small_cache_is_refused_before_anything_is_decoded():
    prompted = Prompted(talking_model(0), 0, 1, 4, 3, 1)
    with pytest.raises(ValueError, match=r"the cache has \d+ slots, \d+ are needed"):
        prompted.speculate(
            lambda known, states, place: known.repeat(1, 2), 3, SamplingSettings(temperature=0, max_length=40)
        )


def test_scripted_texts_are_taken_at_the_scripted_pace():
    """Benchmarks fix the text and what a block gains; the closing token's guess saves the last pass as ever."""
    prompted = Prompted(talking_model(0), 0, 2, 20, 5, 1)
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15, 10, 11, CLOSING, STOP], [12] * 8 + [CLOSING, STOP]])
    settings = SamplingSettings(temperature=0, max_length=20)
    network = random_drafter(5, 1, 0)
    propose = lambda known, states, place: network.propose(prompted.model.language, known, states, None)  # noqa: E731
    decoder = prompted.decoder(propose, 5, settings, rows=2, script=Script(tokens, 3))
    found = decoder.decode(prompted.clear(), prompted.logits, prompted.states)
    assert found.text.rows() == tokens.tolist()
    assert (found.rounds, found.blocks, found.accept_length) == (3, 6, 3.0)
    one_by_one = prompted.decoder(None, 1, settings, rows=2, script=Script(tokens, 1))
    found = one_by_one.decode(prompted.clear(), prompted.logits)
    assert (found.text.rows(), found.rounds) == (tokens.tolist(), 9)
