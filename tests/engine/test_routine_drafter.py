"""Routine drafters: where their slots stand, what they look at, and that the engine's texts stay the target's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flashdrive_node.engine.drafter import Drafter
from flashdrive_node.engine.drafter_config import PARTS, ROTARIES, DrafterConfig, parse_drafter_config, rotary_sections
from flashdrive_node.engine.novelty import Novelty
from flashdrive_node.engine.prompt_slots import PromptView, cell_weights, place_slots, prompt_room
from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.errors import ConfigError, InputError
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.model.prompt import MAX_NAV_TOKENS, Prompt, driving_prompt, question_prompt
from flashdrive_node.model.sampling import SamplingSettings

CHECKPOINT = Path(__file__).parents[1] / "data" / "oracle_small" / "checkpoint"
SETTINGS = StreamingSettings(
    checkpoint=str(CHECKPOINT),
    device="cpu",
    precision="float32",
    sampling=SamplingSettings(top_k=1, max_length=15),
    cameras=(0, 1),
    image_size=(360, 640),
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_alpamayo(str(CHECKPOINT), "cpu", torch.float32)


def config_of(loaded: LoadedModel, rotary: str = "flat", parts: tuple[str, ...] = PARTS) -> DrafterConfig:
    text = loaded.model.config.text
    decoder = replace(text, num_layers=1, mrope_section=rotary_sections(rotary, text))
    return DrafterConfig(decoder, (1, 3), 8, 2, 9999, rotary, parts)


def random_drafter(config: DrafterConfig, seed: int = 0) -> Drafter:
    drafter = Drafter(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*drafter.parameters(), drafter.mask_embedding):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return drafter.requires_grad_(False).eval()


def prompt_of(loaded: LoadedModel, nav: str | None = None) -> Prompt:
    return driving_prompt(loaded.tokenizer, loaded.model.config, [0, 1], 2, [(10, 18)] * 4, nav)


def view_of(loaded: LoadedModel, config: DrafterConfig, nav: str | None = None, seed: int = 0) -> PromptView:
    """Random states at the slots of a prompt."""
    room = prompt_room(loaded.tokenizer, loaded.model.config)
    slots = place_slots(prompt_of(loaded, nav), config, room)
    generator = torch.Generator().manual_seed(seed)
    cells = len(slots.kinds) - room
    return PromptView(
        torch.randn(1, room, config.context_size, generator=generator),
        torch.randn(1, cells, config.decoder.hidden_size, generator=generator),
        slots.kinds[None],
        slots.positions[None],
        torch.tensor([slots.base]),
    )


def stream_windows(count: int) -> list[Observation]:
    """Windows 0.1 s apart of two cameras that see noise."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, count + 3, 160, 288, 3), dtype=np.uint8)
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = np.arange(-15, 1) * 0.5
    rot = np.tile(np.eye(3, dtype=np.float32), (16, 1, 1))
    found = []
    for k in range(count):
        stamps = tuple(100 * (k + i) for i in range(4))
        cameras = tuple(CameraFrames(c, stamps, tuple(pictures[c, k : k + 4])) for c in (0, 1))
        found.append(Observation(k, stamps[-1], cameras, xyz * (1 - 0.1 * k), rot))
    return found


@pytest.mark.parametrize("nav", [None, "Turn left in 30m"])
def test_slots_hold_the_parts_of_the_prompt(loaded, nav) -> None:
    prompt, room = prompt_of(loaded, nav), prompt_room(loaded.tokenizer, loaded.model.config)
    slots = place_slots(prompt, config_of(loaded), room)
    cells = 4 * 6
    assert len(slots.kinds) == cells + room
    assert slots.kinds[:cells].tolist() == [PARTS.index("images")] * cells
    where = {name: (slots.kinds == PARTS.index(name)).nonzero()[:, 0] for name in PARTS}
    start, end = prompt.history_span
    offset = cells + room - len(prompt.ids)  # from a token of the prompt to its slot
    assert where["history"].tolist() == list(range(start + offset, end + offset))
    nav_slots = [] if nav is None else list(range(prompt.nav_span[0] + offset, prompt.nav_span[1] + offset))
    assert where["navigation"].tolist() == nav_slots
    assert len(where["instruction"]) == len(prompt.ids) - end - len(nav_slots)
    assert int((slots.kinds < 0).sum()) == MAX_NAV_TOKENS + 2 - len(nav_slots)
    # A prompt that is only said to have a navigation text has its slots in the same places.
    told = place_slots(prompt_of(loaded), config_of(loaded), room, len(nav_slots))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(slots, told, strict=True))


def test_positions_of_every_scheme(loaded) -> None:
    prompt, room = prompt_of(loaded, "Turn left in 30m"), prompt_room(loaded.tokenizer, loaded.model.config)
    found = {rotary: place_slots(prompt, config_of(loaded, rotary), room) for rotary in ROTARIES}
    cells, length = 24, len(prompt.ids)
    assert (found["flat"].base, found["mrope"].base) == (length, length + prompt.rope_delta)
    assert found["flat"].positions[0, cells:].tolist() == list(range(length - room, length))
    seen = found["mrope"].kinds >= 0
    tail = prompt.positions[:, -room:].float()[:, seen[cells:]]
    assert torch.equal(found["mrope"].positions[:, cells:][:, seen[cells:]], tail)
    # The first cell is the mean of its tokens, rows 0 to 2 and columns 0 to 2 of the first image.
    tokens = [prompt.images[0].start + 9 * r + c for r in range(3) for c in range(3)]
    assert float(found["flat"].positions[0, 0]) == pytest.approx(sum(tokens) / 9)
    assert found["mrope"].positions[:, 0].tolist() == pytest.approx(
        prompt.positions[:, tokens].float().mean(1).tolist()
    )
    assert found["local"].positions[0, seen].tolist() == list(range(-int(seen.sum()), 0))
    weights = cell_weights(prompt, (2, 3))
    assert weights.shape == (24, 4 * 45)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(24))


def test_a_question_has_no_slots(loaded) -> None:
    question = question_prompt(loaded.tokenizer, loaded.model.config, [1], 1, [(10, 18)], "Why?")
    with pytest.raises(InputError, match="a driving prompt is required"):
        place_slots(question, config_of(loaded), 100)


@pytest.mark.parametrize("rotary", ROTARIES)
def test_guesses_follow_from_what_is_looked_at_alone(loaded, rotary) -> None:
    config = config_of(loaded, rotary, ("history",))
    drafter, view = random_drafter(config), view_of(loaded, config, "Turn left in 30m")
    token = torch.randn(3, config.decoder.hidden_size, generator=torch.Generator().manual_seed(3))
    context = torch.randn(3, 2, config.context_size, generator=torch.Generator().manual_seed(4))
    place = torch.tensor([0, 4, 9])
    expected = drafter(token, context, drafter.read(view), place)
    # Whatever stands in hidden slots; and one memory serves texts as one for each does.
    blind = torch.where(view.kinds[..., None] < 0, 1e3, view.states)
    torch.testing.assert_close(drafter(token, context, drafter.read(view._replace(states=blind)), place), expected)
    each = drafter.read(view).rows(torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(drafter(token, context, each, place), expected)
    other = torch.where(view.kinds[..., None] >= 0, view.states.flip(1), view.states)
    assert not torch.allclose(drafter(token, context, drafter.read(view._replace(states=other)), place), expected)
    # Places in the text count where positions go along the prompt.
    moved = drafter(token, context, drafter.read(view), place + 3)
    assert torch.allclose(moved, expected) == (rotary == "local")
    if rotary != "local":
        with pytest.raises(InputError, match="a prompt and places in the texts are required"):
            drafter(token, context)


def test_attention_by_hand(loaded) -> None:
    """Recorded weights times values are what the layer made of them."""
    config = config_of(loaded)
    drafter, view = random_drafter(config), view_of(loaded, config)
    weights: list[Tensor] = []
    token, context = torch.randn(2, config.decoder.hidden_size), torch.randn(2, 2, config.context_size)
    hidden = drafter(token, context, drafter.read(view), torch.tensor([0, 5]), weights)
    (found,) = weights
    slots = view.kinds.shape[1]
    assert found.shape == (2, config.decoder.num_heads, 8, slots + 2 + 8)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:-1]))
    assert not found[..., :slots][..., view.kinds[0] < 0].any()
    # The same pass without the recording.
    torch.testing.assert_close(drafter(token, context, drafter.read(view), torch.tensor([0, 5])), hidden)


@pytest.mark.parametrize("rotary", ROTARIES)
@pytest.mark.parametrize("mode", ["kv", "full"])
def test_the_engine_writes_what_the_target_writes(loaded, rotary, mode) -> None:
    drafter = random_drafter(config_of(loaded, rotary))
    settings = replace(SETTINGS, stream=StreamSettings(mode))
    drafted, undrafted = StreamingEngine(settings, loaded, drafter), StreamingEngine(settings, loaded)
    room = prompt_room(loaded.tokenizer, loaded.model.config)
    for number, window in enumerate(stream_windows(3)):
        window = replace(window, nav_text="Turn left in 30m" if number == 1 else None)
        one, other = drafted.step(window), undrafted.step(window)
        assert one.trajectory.reasoning == other.trajectory.reasoning
        torch.testing.assert_close(one.trajectory.xyz, other.trajectory.xyz, rtol=1e-4, atol=1e-4)
        assert one.metrics["tokens"] == other.metrics["tokens"] == len(one.trajectory.tokens)
        assert not other.trajectory.tokens
        # What the drafter looked at is what stands at its slots.
        reader = drafted.reader
        prompt = driving_prompt(
            loaded.tokenizer, loaded.model.config, [0, 1], 4, drafted._grids(window), window.nav_text
        )
        slots = place_slots(prompt, drafter.config, room)
        assert torch.equal(reader._view.kinds[0], slots.kinds)
        embeddings = drafted.stream.embeddings(len(prompt.image_index))
        expected = cell_weights(prompt, (2, 3)) @ embeddings
        torch.testing.assert_close(reader._view.cells[0], expected)
        memory = drafter.read(reader._view._replace(cells=expected[None], states=drafted.stream.states[None, -room:]))
        torch.testing.assert_close(reader.memory.keys, memory.keys)


def test_blocks_are_as_long_as_the_drafter_is_sure_and_texts_stay(loaded) -> None:
    drafter = random_drafter(config_of(loaded))
    windows = stream_windows(2)
    plain = StreamingEngine(SETTINGS, loaded).step(windows[0]).trajectory.reasoning
    for confidence in (0.0, 1e-30, 0.999):
        engine = StreamingEngine(replace(SETTINGS, draft_confidence=confidence), loaded, drafter)
        sizes: list[int] = []
        engine.step(windows[0])
        decoder = engine._stages.decoder
        check = decoder._check
        decoder._check = lambda size, check=check, sizes=sizes: (sizes.append(size), check(size))[1]
        engine.reset("again")
        assert engine.step(windows[0]).trajectory.reasoning == plain
        # Never sure: the smallest block; sure of anything: the whole.
        assert set(sizes) == {2 if confidence == 0.999 else 8}, confidence
    with pytest.raises(InputError, match="draft_confidence must be 0"):
        replace(SETTINGS, draft_confidence=1.0)


def test_tokens_are_labelled_by_who_found_them(loaded) -> None:
    """A drafter that is never right leaves every token to the model; one that knows the text, all but one a block."""
    drafter = random_drafter(config_of(loaded))
    window = stream_windows(1)[0]
    engine = StreamingEngine(replace(SETTINGS, samples=2, shared_text=True), loaded, drafter)
    prediction = engine.step(window)
    tokens = prediction.trajectory.tokens
    share = prediction.metrics["deliberative_share"]
    assert share == pytest.approx(sum(not token.routine for token in tokens) / len(tokens))
    assert not tokens[0].routine
    assert prediction.samples[0].tokens == prediction.samples[1].tokens
    ids = engine._said.text.rows()[0]
    assert [token.text for token in tokens] == [loaded.tokenizer.decode([i]) for i in ids]
    # Its own text as the guesses.
    drafter.propose = lambda language, known, context, forbidden, prompt, place: torch.tensor(
        [(ids + [0] * 20)[int(place) + 1 : int(place) + 8]]
    )
    engine = StreamingEngine(SETTINGS, loaded, drafter)
    tokens = engine.step(window).trajectory.tokens
    assert [token.routine for token in tokens] == [i % 8 != 0 for i in range(len(tokens))]


def test_novelty_is_the_share_against_what_was_before() -> None:
    novelty = Novelty(windows=2)
    first = novelty.see([[False, True, True, True]])
    assert first == {"deliberative_share": 0.25, "deliberative_mean": 0.25, "novelty": 1.0}
    assert novelty.see([[False, False, True, True], [False, True, False, True]])["novelty"] == pytest.approx(2.0)
    # Mean of both windows, then of about the last two.
    assert novelty.see([[False, True]])["deliberative_mean"] == pytest.approx(0.375)
    assert novelty.see([[False, True]])["deliberative_mean"] == pytest.approx(0.4375)
    novelty.reset()
    assert novelty.see([[False]])["novelty"] == 1.0


def test_configurations_that_are_refused(loaded) -> None:
    target = loaded.model.config
    content = {
        "architectures": ["RoutineDraftModel"], "hidden_size": target.text.hidden_size, "num_attention_heads": 2,
        "head_dim": 8, "num_hidden_layers": 1, "intermediate_size": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "target_layer_ids": [0], "block_size": 4, "mask_token_id": 7,
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parse_drafter_config(content, target, "config.json")
    assert len(caught.value.problems) == 2
    wrong = {"rotary": "mrope", "prompt_parts": ["pictures"], "image_cells": [0, 1]}
    with pytest.raises(ConfigError) as caught:
        parse_drafter_config(json.loads(json.dumps(content | wrong)), target, "config.json")
    for expected in (
        "key 'prompt_parts' must be a list out of images, history, navigation, instruction, found ['pictures']",
        "key 'image_cells' must be two positive int (rows, columns), found [0, 1]",
        f"rotary 'mrope' needs the target's head_dim, {target.text.head_dim}, found 8",
    ):
        assert expected in str(caught.value)
