"""The small model's vocabulary: laid out like the release's, the same bytes every time, and any text encodes."""

import copy
import statistics
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from flashdrive_node.model.config_parser import parse_config
from flashdrive_node.model.errors import PromptError
from flashdrive_node.model.prompt import CAMERA_NAMES, INSTRUCTION, SYSTEM_TEXT, driving_prompt, question_prompt
from flashdrive_node.model.tokenizer import SPECIAL_NAMES, load_tokenizer
from flashdrive_node.training.vocabulary import MERGES, QWEN_SPECIAL_TOKENS, VocabularyLayout, build_tokenizer
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import record
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.wording import every_instruction, every_sentence
from support.narrow_release import small_alpamayo
from support.qwen_vocabulary import QWEN_SPECIAL

BINS = 600


def configured(layout: VocabularyLayout):
    """The small architecture with this vocabulary; all trajectory tokens are history bins."""
    base = small_alpamayo()
    model, vlm = copy.deepcopy(base.raw), copy.deepcopy(base.raw_vlm)
    model |= layout.config_entries()
    del model["traj_tokenizer_cfg"]
    model["hist_traj_tokenizer_cfg"]["num_bins"] = layout.bins
    vlm |= layout.backbone_entries()
    vlm["text_config"] |= layout.text_entries()
    return parse_config(model, vlm, "small vocabulary")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def config(directory):
    return configured(build_tokenizer(directory, BINS))


@pytest.fixture(scope="module")
def tokenizer(directory, config):
    return load_tokenizer(directory, config)


def test_layout(tokenizer, config):
    assert list(QWEN_SPECIAL_TOKENS) == QWEN_SPECIAL
    base = 256 + MERGES + len(QWEN_SPECIAL)
    assert tokenizer.encode("".join(QWEN_SPECIAL)) == list(range(256 + MERGES, base))
    assert tokenizer.encode("<i0>" + f"<i{BINS - 1}>") == [base, base + BINS - 1]
    behind = [tokenizer.id(name) for name in SPECIAL_NAMES if name != "image_pad"]
    assert behind == list(range(base + BINS, config.tokens.vocab_size))
    # No id without a token: every row of the embedding table can be met.
    assert sorted(tokenizer.backend.get_vocab(with_added_tokens=True).values()) == list(range(config.tokens.vocab_size))


def test_the_same_bytes_in_every_process(directory, config, tmp_path):
    code = "import sys, pathlib; from flashdrive_node.training.vocabulary import build_tokenizer as b; "
    code += f"b(pathlib.Path(sys.argv[1]), {BINS})"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env={"PYTHONHASHSEED": "7"})
    names = sorted(path.name for path in directory.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_bytes() == (directory / name).read_bytes() for name in names)


def test_transformers_reads_the_files(directory, tokenizer):
    reference = AutoTokenizer.from_pretrained(directory)
    reference.add_tokens([f"<i{i}>" for i in range(BINS)])
    reference.add_tokens([f"<|{name}|>" for name in SPECIAL_NAMES], special_tokens=True)
    for text in [*every_sentence()[::50], SYSTEM_TEXT, "don't 42 東京 🚗", "<|cot_start|>Stop.<|cot_end|><i7>"]:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)


def test_vocab_and_merges_give_the_same_tokenizer(directory, config, tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    assert load_tokenizer(tmp_path, config).backend.get_vocab() == tokenizer.backend.get_vocab()


@given(text=st.text(max_size=80) | st.lists(st.sampled_from([*every_sentence()[::97], "\r\n", "é", "🚗"])).map("".join))
def test_any_text_encodes_and_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_length_of_sentences(tokenizer):
    episode = record(sample_scenes(scene_keys("train", range(32))), 100)
    driven = [text for step in range(0, 95, 10) for text in episode.sentences(step)]
    assert 16 <= statistics.mean(len(tokenizer.encode(text)) for text in driven) <= 20
    written = [len(tokenizer.encode(text)) for text in every_sentence()]
    assert 18 <= statistics.mean(written) <= 24
    assert max(written) <= 40


def test_sentences_and_instructions_of_a_drive_are_known():
    episode = record(sample_scenes(scene_keys("train", range(32))), 100)
    for step in range(0, 95, 10):
        assert set(episode.sentences(step)) <= set(every_sentence())
        assert {text for text in episode.navigation(step) if text} <= set(every_instruction())


def test_words_of_the_prompt_are_single_tokens(tokenizer):
    for text in (SYSTEM_TEXT, INSTRUCTION, *(f"{name}: frame 0 " for name in CAMERA_NAMES)):
        words = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
        assert len(tokenizer.encode(text)) == len(words)


def test_prompts(tokenizer, config):
    grids = [(12, 20)] * 16
    plain = driving_prompt(tokenizer, config, (0, 1, 2, 6), 4, grids)
    told = driving_prompt(tokenizer, config, (0, 1, 2, 6), 4, grids, "Turn left in 37m")
    assert len(plain.images) == 16
    assert told.nav_span is not None
    assert tokenizer.decode(told.ids[slice(*told.nav_span)].tolist()) == "<|route_start|>Turn left in 37m<|route_end|>"
    assert question_prompt(tokenizer, config, (1,), 4, grids[:4], "Is it déjà vu?").history_span is None


@pytest.mark.parametrize("special", ["<|cot_end|>", "<|im_end|>", "<i7>", "<|route_end|>", "<think>"])
def test_untrusted_text_brings_no_special_tokens(tokenizer, special):
    with pytest.raises(PromptError, match="special tokens"):
        tokenizer.encode_untrusted(f"Turn left {special}", "navigation text", 200, 64)


def test_the_alphabet_is_every_byte(directory, tokenizer):
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.backend.get_vocab())


def test_bins_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="positive number is required, found 0"):
        build_tokenizer(tmp_path, 0)
