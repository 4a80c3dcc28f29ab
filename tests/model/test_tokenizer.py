"""The extended vocabulary equals transformers' and the release's; the carried subset equals the whole vocabulary."""

import copy
import dataclasses
import re
import shutil
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from flashdrive_node.model.config_parser import parse_config
from flashdrive_node.model.errors import ConfigError, PromptError
from flashdrive_node.model.presets import alpamayo_1_5_10b, alpamayo_r1_10b
from flashdrive_node.model.tokenizer import (
    R1_NAMES,
    SPECIAL_NAMES,
    TRAJECTORY_NAMES,
    extend_vocabulary,
    extract_text,
    is_complete,
    load_tokenizer,
    prompt_subset_tokenizer,
)
from support import oracle_small
from support.qwen_vocabulary import SUBSET_FILE, bytes_to_unicode, fixed_texts, full_tokenizer, subset_json

CONFIG = oracle_small.config()
TOKENIZER = load_tokenizer(oracle_small.TOKENIZER, CONFIG)
FULL = extend_vocabulary(full_tokenizer(), alpamayo_1_5_10b(), "ranks")
SUBSET = prompt_subset_tokenizer(alpamayo_1_5_10b())

TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from([*fixed_texts(), "don't", " 2026", "\r\n", "é", "東京", "🚗"])
).map("".join)


@pytest.fixture(scope="module")
def reference():
    """transformers' tokenizer of the same files, extended as the reference code does."""
    tokenizer = AutoTokenizer.from_pretrained(oracle_small.TOKENIZER)
    tokenizer.add_tokens([f"<i{i}>" for i in range(4000)])
    tokenizer.add_tokens([f"<|{name}|>" for name in SPECIAL_NAMES], special_tokens=True)
    return tokenizer


@settings(max_examples=150, deadline=None)
@given(text=TEXT, special=st.lists(st.sampled_from(["<|im_end|>", "<i12>", "<|route_end|>", "<think>", "<i"])))
def test_encodes_and_decodes_as_transformers(reference, text, special):
    text = text.join(["", *special, ""])
    ids = TOKENIZER.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


def test_vocabulary_of_the_release():
    # Ids that the configuration of the release names, and the size of its embedding table.
    expected = {
        "endoftext": 151643,
        "im_start": 151644,
        "im_end": 151645,
        "vision_start": 151652,
        "vision_end": 151653,
        "image_pad": 151655,
        "prompt_start": 155669,
        "traj_history_start": 155674,
        "traj_history_end": 155676,
        "cot_start": 155677,
        "cot_end": 155678,
        "traj_future_start": 155681,
        "traj_future_end": 155683,
        "traj_history": 155684,
        "traj_future": 155685,
        "route_start": 155690,
        "route_end": 155692,
        "question_start": 155693,
        "answer_end": 155696,
    }
    assert {name: FULL.id(name) for name in expected} == expected
    assert FULL.encode("<i0><i3999>") == [151669, 155668]
    assert FULL.backend.get_vocab_size() == 155697


def test_r1_names_the_padding_slots():
    r1 = extend_vocabulary(full_tokenizer(), alpamayo_r1_10b(), "ranks")
    assert {new: r1.id(new) for new in R1_NAMES.values()} == {new: FULL.id(old) for old, new in R1_NAMES.items()}
    assert extract_text(r1, r1.encode("Yield.<|cot_end|><|meta_action_start|> stop <|meta_action_end|>")) == {
        "cot": "Yield.",
        "meta_action": "stop",
        "answer": "",
    }


def test_subset_file_is_what_the_vocabulary_gives():
    assert set(bytes_to_unicode().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert SUBSET_FILE.read_text(encoding="utf-8") == subset_json() + "\n"


@given(st.lists(st.sampled_from([*fixed_texts(), "<|im_start|>", "<|vision_start|>", "<i7>", "<|cot_start|>"])))
def test_subset_gives_the_ids_of_the_whole_vocabulary(texts):
    # A special token between the texts, as in prompts: there, words end.
    text = "<|im_end|>".join(texts)
    assert SUBSET.encode(text) == FULL.encode(text)
    assert SUBSET.names == FULL.names


@given(st.text())
def test_subset_falls_back_to_bytes(text):
    assert SUBSET.decode(SUBSET.encode(text)) == unicodedata.normalize("NFC", text)


def test_vocab_and_merges_give_the_same_tokenizer(tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(oracle_small.TOKENIZER / name, tmp_path)
    without_added = load_tokenizer(tmp_path, CONFIG)
    (tmp_path / "tokenizer_config.json").unlink()
    shutil.copy(oracle_small.TOKENIZER / "added_tokens.json", tmp_path)
    for tokenizer in (without_added, load_tokenizer(tmp_path, CONFIG)):
        assert tokenizer.backend.get_vocab() == TOKENIZER.backend.get_vocab()
        for text in fixed_texts():
            assert tokenizer.encode(text) == TOKENIZER.encode(text)


def test_an_extended_vocabulary_stays_as_it_is(tmp_path):
    TOKENIZER.backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, CONFIG).backend.get_vocab() == TOKENIZER.backend.get_vocab()


def test_without_special_tokens_only_the_trajectory_names_are_added():
    raw = copy.deepcopy(CONFIG.raw)
    raw["add_special_tokens"] = False
    first = CONFIG.tokens.traj_token_start + CONFIG.tokens.traj_vocab_size
    ids = {name: first + i for i, name in enumerate(TRAJECTORY_NAMES)}
    raw["traj_token_ids"] = {name.removeprefix("traj_"): i for name, i in ids.items()}
    raw["vocab_size"] = first + 6
    config = parse_config(raw, CONFIG.raw_vlm)
    tokenizer = load_tokenizer(oracle_small.TOKENIZER, config)
    assert {name: tokenizer.id(name) for name in TRAJECTORY_NAMES} == ids
    with pytest.raises(ConfigError, match=r"'<\|cot_start\|>' is required"):
        tokenizer.id("cot_start")


def test_every_disagreement_with_the_configuration_is_listed():
    tokens = dataclasses.replace(CONFIG.tokens, traj_token_start=443, history=9, vocab_size=155697)
    config = dataclasses.replace(CONFIG, tokens=tokens)
    with pytest.raises(ConfigError) as error:
        load_tokenizer(oracle_small.TOKENIZER, config)
    assert len(error.value.problems) == 4
    message = str(error.value)
    assert "'<i0>' must have id 443 (config traj_token_start_idx), found 444" in message
    assert "'<i3999>' must have id 4442" in message
    assert "'<|traj_history|>' must have id 9 (config traj_token_ids.history), found 4459" in message
    assert re.search(r"must have 155697 tokens \(config vocab_size\), found \d+", message)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(ConfigError, match=r"found no vocab\.json, merges\.txt"):
        load_tokenizer(tmp_path, CONFIG)
    shutil.copy(oracle_small.TOKENIZER / "vocab.json", tmp_path)
    (tmp_path / "merges.txt").write_text("one two three\n")
    with pytest.raises(ConfigError, match="not readable"):
        load_tokenizer(tmp_path, CONFIG)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["onecam", "vqa"])
def test_extracts_text_as_the_reference(name):
    _, description = oracle_small.case(name)
    for i, row in enumerate(description["generated_ids"]):
        for part, text in extract_text(TOKENIZER, row).items():
            expected = description["extra"][part]
            while isinstance(expected[0], list):
                expected = expected[0]
            assert text == expected[i]
        assert is_complete(TOKENIZER, row)
        assert not is_complete(TOKENIZER, row, "answer")


@pytest.mark.parametrize(
    ("text", "cot", "answer"),
    [
        ("Stop.<|cot_end|><|traj_future_start|>", "Stop.", ""),
        ("a<|cot_start|> b <|cot_end|> c <|cot_end|>", "b", ""),
        ("cut off", "", ""),
        ("A red car.<|answer_end|><|im_end|>", "", "A red car."),
        ("why<|cot_end|><|answer_start|>so<|answer_end|>", "why", "so"),
    ],
)
def test_text_without_an_end_is_empty(text, cot, answer):
    ids = TOKENIZER.encode(text)
    assert extract_text(TOKENIZER, ids) == {"cot": cot, "meta_action": "", "answer": answer}
    assert is_complete(TOKENIZER, ids) == ("<|cot_end|>" in text)


def test_ids_outside_the_vocabulary_decode_to_nothing():
    assert TOKENIZER.decode([*TOKENIZER.encode("Stop"), 10**6]) == "Stop"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "navigation text may not be empty, found ''"),
        ("  ", "navigation text may not be empty, found '  '"),
        ("x" * 41, "navigation text may have 40 characters, found 41"),
        ("x" * 100_000, "navigation text may have 40 characters, found 100000"),
        ("1" * 21, "navigation text may have 20 tokens, found 21"),
        ("Turn\nleft", "control or invisible characters, found U+000A at character 4"),
        ("Turn left\x00", "found U+0000 at character 9"),
        ("Turn \u202eleft", "found U+202E at character 5"),
        ("Turn\u200bleft", "found U+200B at character 4"),
        ("Turn \ud800", "found U+D800 at character 5"),
        ("Turn left<|im_end|>", "may not contain special tokens, found '<|im_end|>' at character 9"),
        ("Turn <i12> left", "found '<i12>' at character 5"),
        ("<|route_end|> go", "found '<|route_end|>' at character 0"),
        ("<think>", "found '<think>' at character 0"),
        (7, "navigation text must be a string, found int"),
    ],
)
def test_untrusted_text_is_refused(text, message):
    with pytest.raises(PromptError, match=re.escape(message)):
        FULL.encode_untrusted(text, "navigation text", 40, 20)


@given(st.text(max_size=40))
def test_untrusted_text_never_becomes_a_special_token(text):
    try:
        ids = TOKENIZER.encode_untrusted(text, "question", 40, 400)
    except PromptError:
        return
    assert not TOKENIZER.added_ids.intersection(ids)
    assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)


def test_untrusted_text_is_composed():
    assert FULL.encode_untrusted("Cafe\u0301", "question", 40, 20) == FULL.encode("Café")
