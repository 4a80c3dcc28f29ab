"""The Qwen byte-pair tokenizer, extended by trajectory bins and the model's own special tokens.

Works on the plain `tokenizers` library, whose files have stayed the same while the tokenizer classes around them
changed. Untrusted text (navigation, questions) goes through `encode_untrusted` only.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from flashdrive_node.model.config import ALPAMAYO_1_5, AlpamayoConfig
from flashdrive_node.model.errors import ConfigError, PromptError

#: Names of the special tokens in the order in which the release adds them; `<|image_pad|>` exists in the base already.
SPECIAL_NAMES = (
    "prompt_start",
    "prompt_end",
    "image_start",
    "_padding_0",
    "image_end",
    "traj_history_start",
    "_padding_1",
    "traj_history_end",
    "cot_start",
    "cot_end",
    "_padding_2",
    "_padding_3",
    "traj_future_start",
    "_padding_4",
    "traj_future_end",
    "traj_history",
    "traj_future",
    "image_pad",
    "_padding_5",
    "_padding_6",
    "_padding_7",
    "_padding_8",
    "route_start",
    "route_pad",
    "route_end",
    "question_start",
    "question_end",
    "answer_start",
    "answer_end",
)

#: Names that R1 gives to slots which 1.5 keeps as padding.
R1_NAMES = {
    "_padding_0": "image_pre_tkn",
    "_padding_1": "traj_history_pre_tkn",
    "_padding_2": "meta_action_start",
    "_padding_3": "meta_action_end",
    "_padding_4": "traj_future_pre_tkn",
    "_padding_5": "vectorized_wm",
    "_padding_6": "vectorized_wm_start",
    "_padding_7": "vectorized_wm_end",
    "_padding_8": "vectorized_wm_pre_tkn",
}

#: What is added instead where the configuration says ``add_special_tokens: false``.
TRAJECTORY_NAMES = (
    "traj_history",
    "traj_future",
    "traj_history_start",
    "traj_future_start",
    "traj_history_end",
    "traj_future_end",
)

#: Tokens of the Qwen vocabulary that every prompt needs.
BASE_NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad")

#: How Qwen2 cuts text into words before merging bytes; digits stand alone.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: Unicode categories without a place in an instruction: control, format (text direction, zero width), surrogate,
#: private use, unassigned, line and paragraph separators. They are invisible, so a person could not check the text.
_REFUSED_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class ExtractedText(TypedDict):
    """Text taken out of generated tokens; empty where a part is missing or has no end."""

    cot: str
    meta_action: str
    answer: str


@dataclass(frozen=True, eq=False)
class AlpamayoTokenizer:
    """Text to ids and back. Compared and hashed by identity, so that prompts can be cached per tokenizer."""

    backend: Tokenizer
    #: Ids of the special tokens by name without ``<|`` and ``|>``, for example "cot_end".
    names: Mapping[str, int]
    #: Ids of everything that is matched as a whole in text: special tokens, trajectory bins, tool and think tags.
    added_ids: frozenset[int]

    def id(self, name: str) -> int:
        """Id of the special token ``<|name|>``.

        Raises:
            ConfigError: The vocabulary has no such token.
        """
        if name not in self.names:
            raise ConfigError("tokenizer", [f"special token '<|{name}|>' is required, the vocabulary has none"])
        return self.names[name]

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text; special tokens written in it are recognised, none are put around it."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_untrusted(self, text: str, what: str, max_characters: int, max_tokens: int) -> list[int]:
        """Ids of text from outside, in Unicode normal form C; nothing in it can be more than text.

        Args:
            text: The text.
            what: What it is, for the error message.
            max_characters: Longest text, counted after normalisation.
            max_tokens: Most tokens.

        Raises:
            PromptError: Empty, too long, or with control characters or special tokens; says which and where.
        """
        if not isinstance(text, str):
            raise PromptError(f"{what} must be a string, found {type(text).__name__}")
        # Before normalising, which at most composes a few characters into one: a huge text costs nothing.
        if len(text) > 4 * max_characters:
            raise PromptError(f"{what} may have {max_characters} characters, found {len(text)}")
        for position, character in enumerate(text):
            if unicodedata.category(character) in _REFUSED_CATEGORIES:
                raise PromptError(
                    f"{what} may not contain control or invisible characters, found U+{ord(character):04X} at "
                    f"character {position}"
                )
        text = unicodedata.normalize("NFC", text)
        if not text.strip():
            raise PromptError(f"{what} may not be empty, found {text!r}")
        if len(text) > max_characters:
            raise PromptError(f"{what} may have {max_characters} characters, found {len(text)}")
        encoding = self.backend.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self.added_ids:
                raise PromptError(
                    f"{what} may not contain special tokens, found {text[start:end]!r} at character {start}"
                )
        if len(encoding.ids) > max_tokens:
            raise PromptError(f"{what} may have {max_tokens} tokens, found {len(encoding.ids)}")
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens written out; an id outside the vocabulary gives nothing."""
        text: str = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


def extend_vocabulary(backend: Tokenizer, config: AlpamayoConfig, where: str) -> AlpamayoTokenizer:
    """Add trajectory bins and special tokens to a Qwen tokenizer (which is changed) and check every id.

    Args:
        backend: Base vocabulary, or one that has been extended already.
        config: The checkpoint's configuration, which says how many bins there are and which ids it expects.
        where: Origin of the tokenizer, for the error message.

    Raises:
        ConfigError: Lists every id and size that disagrees with the configuration.
    """
    bins = config.tokens.traj_vocab_size
    backend.add_tokens([AddedToken(f"<i{i}>", special=False, normalized=True) for i in range(bins)])
    names: tuple[str, ...] = SPECIAL_NAMES if config.raw.get("add_special_tokens", False) else TRAJECTORY_NAMES
    if config.model_type != ALPAMAYO_1_5:
        names = tuple(R1_NAMES.get(name, name) for name in names)
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])

    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    known = {text[2:-2]: i for text, i in added.items() if text.startswith("<|") and text.endswith("|>")}
    problems = [f"token '<|{name}|>' is required, found none" for name in BASE_NAMES if name not in known]
    tokens, vlm = config.tokens, config.raw_vlm
    expected = {
        "<i0>": ("traj_token_start_idx", tokens.traj_token_start),
        f"<i{bins - 1}>": ("traj_token_start_idx + traj_vocab_size - 1", tokens.traj_token_start + bins - 1),
        "<|traj_history|>": ("traj_token_ids.history", tokens.history),
        "<|traj_history_start|>": ("traj_token_ids.history_start", tokens.history_start),
        "<|traj_history_end|>": ("traj_token_ids.history_end", tokens.history_end),
        "<|traj_future|>": ("traj_token_ids.future", config.raw.get("traj_token_ids", {}).get("future")),
        "<|traj_future_start|>": ("traj_token_ids.future_start", tokens.future_start),
        "<|traj_future_end|>": ("traj_token_ids.future_end", tokens.future_end),
        "<|image_pad|>": ("backbone image_token_id", vlm.get("image_token_id")),
        "<|vision_start|>": ("backbone vision_start_token_id", vlm.get("vision_start_token_id")),
        "<|vision_end|>": ("backbone vision_end_token_id", vlm.get("vision_end_token_id")),
    }
    for text, (key, want) in expected.items():
        if want is not None and added.get(text) != want:
            problems.append(f"token {text!r} must have id {want} (config {key}), found {added.get(text)}")
    size = max(added.values()) + 1  # not the number of tokens: the subset for benchmarks has gaps
    if size != tokens.vocab_size:
        problems.append(f"vocabulary must have {tokens.vocab_size} tokens (config vocab_size), found {size}")
    if problems:
        raise ConfigError(where, problems)
    return AlpamayoTokenizer(backend, known, frozenset(added.values()))


def load_tokenizer(directory: str | Path, config: AlpamayoConfig) -> AlpamayoTokenizer:
    """Read ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, and extend it for the checkpoint.

    Args:
        directory: The checkpoint's or its backbone's directory.
        config: The checkpoint's configuration.

    Raises:
        ConfigError: Files are missing, unreadable or of another kind, or ids disagree with the configuration.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        where = directory / "tokenizer.json"
        try:
            backend = Tokenizer.from_file(str(where))
        except Exception as error:  # the library raises no narrower type
            raise ConfigError(str(where), [f"a tokenizer of the tokenizers library is required: {error}"]) from error
    else:
        where = directory
        backend = _from_vocab_and_merges(directory)
    backend.no_truncation()
    backend.no_padding()
    return extend_vocabulary(backend, config, str(where))


def prompt_subset_tokenizer(config: AlpamayoConfig) -> AlpamayoTokenizer:
    """The part of the Qwen vocabulary that prompts need, at its real ids, for runs without a checkpoint's files.

    Fixed prompt texts and common instructions get the ids of the whole vocabulary; other text falls back to bytes.

    Raises:
        ConfigError: The configuration is not for the Qwen vocabulary.
    """
    resource = files("flashdrive_node.model") / "data" / "qwen_prompt_vocab.json"
    backend = Tokenizer.from_str(resource.read_text(encoding="utf-8"))
    return extend_vocabulary(backend, config, resource.name)


def _from_vocab_and_merges(directory: Path) -> Tokenizer:
    missing = [name for name in ("vocab.json", "merges.txt") if not (directory / name).is_file()]
    if missing:
        raise ConfigError(
            str(directory),
            [f"tokenizer.json, or vocab.json and merges.txt, are required, found no {', '.join(missing)}"],
        )
    try:
        vocab, merges = BPE.read_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
        settings = _json_object(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
        extra = {v["content"]: int(i) for i, v in settings.items()} or _json_object(directory / "added_tokens.json")
    except Exception as error:
        raise ConfigError(
            str(directory), [f"vocab.json, merges.txt and added tokens are not readable: {error}"]
        ) from error
    return byte_pair_tokenizer(vocab, merges, extra)


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value if isinstance(value, dict) else {}


def byte_pair_tokenizer(vocab: dict[str, int], merges: Sequence[tuple[str, str]], special: dict[str, int]) -> Tokenizer:
    """A Qwen2 tokenizer from its parts; special tokens take the ids behind the vocabulary in the order of their ids."""
    backend = Tokenizer(BPE(vocab=vocab, merges=list(merges), fuse_unk=False, byte_fallback=False))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    in_order = sorted(special, key=lambda text: special[text])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in in_order])
    return backend


def extract_text(tokenizer: AlpamayoTokenizer, ids: Iterable[int]) -> ExtractedText:
    """Reasoning, meta action and answer of one generated row.

    The start token may be missing, because it is the prompt's last token; a part without its end token is "".
    """
    text = tokenizer.decode(ids)
    return ExtractedText(
        cot=_before_end(text, "cot"), meta_action=_before_end(text, "meta_action"), answer=_before_end(text, "answer")
    )


def is_complete(tokenizer: AlpamayoTokenizer, ids: Iterable[int], part: str = "cot") -> bool:
    """Whether generated tokens contain the end of a part ("cot", "meta_action" or "answer")."""
    end = tokenizer.names.get(f"{part}_end")
    return end is not None and any(int(i) == end for i in ids)


def _before_end(text: str, part: str) -> str:
    before, end, _ = text.partition(f"<|{part}_end|>")
    return before.rpartition(f"<|{part}_start|>")[2].strip() if end else ""
