"""The small model's own vocabulary: byte-level pairs of the world's texts, laid out as the release lays out Qwen's.

    256 bytes | merges | special tokens of Qwen | <i0> <i1> ... | special tokens of the release

Files hold the part up to Qwen's special tokens, as those of the release's backbone do; `load_tokenizer` adds the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers, trainers

from flashdrive_node.model.prompt import CAMERA_NAMES, INSTRUCTION, SYSTEM_TEXT
from flashdrive_node.model.tokenizer import SPECIAL_NAMES, byte_pair_tokenizer
from flashdrive_node.world.wording import every_instruction, every_sentence

#: Pairs that are learnt. Every word of the prompt becomes one token; a sentence has 18 tokens on average as the world's
#: causes occur and 22 over all wordings, so that predicting several tokens at once has something to gain.
MERGES = 256

#: Trajectory tokens: the history alone, in as many bins as the release has for it.
HISTORY_BINS = 1000

#: Special tokens of the Qwen2 vocabulary, in the order of their ids.
QWEN_SPECIAL_TOKENS = (
    *(f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end")),
    *(f"<|{name}|>" for name in ("box_start", "box_end", "quad_start", "quad_end", "vision_start")),
    *(f"<|{name}|>" for name in ("vision_end", "vision_pad", "image_pad", "video_pad")),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)

#: How often each fixed text counts beside the sentences: its words stand in every prompt.
_PROMPT_WEIGHT = 500
#: Frames per camera whose labels are learnt.
_FRAMES = 10


@dataclass(frozen=True)
class VocabularyLayout:
    """Where things stand in the finished vocabulary, for the configuration of a checkpoint."""

    #: Ids below the first trajectory token: bytes, merges, special tokens of Qwen.
    base_size: int
    #: Trajectory tokens: the history's bins, behind those of the future where the checkpoint has a tokenizer for it.
    bins: int

    @property
    def size(self) -> int:
        """Rows of the embedding table."""
        return self.base_size + self.bins + len(SPECIAL_NAMES) - 1

    def config_entries(self) -> dict[str, Any]:
        """Keys of ``config.json`` that name ids and sizes."""
        # <|image_pad|> exists in the base already, so adding it takes no id.
        added = [name for name in SPECIAL_NAMES if name != "image_pad"]
        ids = {name: self.base_size + self.bins + i for i, name in enumerate(added)}
        named = ("future", "future_end", "future_start", "history", "history_end", "history_start")
        return {
            "add_special_tokens": True,
            "traj_token_ids": {name: ids[f"traj_{name}"] for name in named},
            "traj_token_start_idx": self.base_size,
            "traj_vocab_size": self.bins,
            "vocab_size": self.size,
        }

    def backbone_entries(self) -> dict[str, int]:
        """Keys of the backbone's ``config.json`` that name ids."""
        keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        names = ("image_pad", "video_pad", "vision_start", "vision_end")
        return {key: self._special(name) for key, name in zip(keys, names, strict=True)}

    def text_entries(self) -> dict[str, int]:
        """Keys of the backbone's ``text_config`` that name ids and sizes."""
        return {
            "bos_token_id": self._special("endoftext"),
            "eos_token_id": self._special("im_end"),
            "vocab_size": self.base_size,
        }

    def _special(self, name: str) -> int:
        return self.base_size - len(QWEN_SPECIAL_TOKENS) + QWEN_SPECIAL_TOKENS.index(f"<|{name}|>")


def build_tokenizer(directory: Path, bins: int = HISTORY_BINS) -> VocabularyLayout:
    """Learn the vocabulary and write the tokenizer's and processor's files that a Qwen3-VL backbone has.

    Args:
        directory: Where to; made if need be, files in it are replaced. The same bytes every time.
        bins: Trajectory tokens that the checkpoint will have.

    Raises:
        ValueError: `bins` is not positive.
        OSError: Writing failed.
    """
    if bins < 1:
        raise ValueError(f"bins: a positive number is required, found {bins}")
    directory.mkdir(parents=True, exist_ok=True)
    backend = learn_vocabulary(texts())
    backend.model.save(str(directory))
    backend.save(str(directory / "tokenizer.json"))
    special = {text: backend.token_to_id(text) for text in QWEN_SPECIAL_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(i): {"content": text, **flags} for text, i in special.items()}
    _write(directory / "added_tokens.json", special)
    _write(directory / "tokenizer_config.json", {"added_tokens_decoder": decoder, **_TOKENIZER_CONFIG})
    _write(directory / "special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    _write(directory / "preprocessor_config.json", _PREPROCESSOR_CONFIG)
    return VocabularyLayout(backend.get_vocab_size(), bins)


def learn_vocabulary(corpus: Iterable[str], merges: int = MERGES) -> Tokenizer:
    """Byte-level pairs of a corpus, most frequent first, and Qwen's special tokens behind them."""
    backend = byte_pair_tokenizer({}, [], {})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator(corpus, trainer)
    # Only the constructor puts special tokens behind the pairs at fixed ids, whatever the trainer made of them.
    learnt = json.loads(backend.to_str())["model"]
    special = {text: i for i, text in enumerate(QWEN_SPECIAL_TOKENS)}
    return byte_pair_tokenizer(learnt["vocab"], [(a, b) for a, b in learnt["merges"]], special)


def texts() -> Iterator[str]:
    """What the vocabulary is learnt from: the prompt's fixed texts, and all sentences and instructions of the world."""
    for _ in range(_PROMPT_WEIGHT):
        yield from (SYSTEM_TEXT, INSTRUCTION, "system\n", "user\n", "assistant\n")
        yield from (f"{start}{name}: frame 0 " for name in CAMERA_NAMES for start in ("", "user\n"))
        yield from (f"frame {i} " for i in range(_FRAMES))
    yield from every_sentence()
    yield from every_instruction()


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


#: As in the files of Qwen3-VL.
_TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": 262144,
    "pad_token": "<|endoftext|>",
    "processor_class": "Qwen3VLProcessor",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
_PREPROCESSOR_CONFIG = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "processor_class": "Qwen3VLProcessor",
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "temporal_patch_size": 2,
}
