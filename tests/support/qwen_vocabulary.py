"""The real Qwen vocabulary, and the part of it that the package carries for benchmarks without a download.

``python tests/support/qwen_vocabulary.py`` writes that part anew.
"""

import base64
import itertools
from functools import cache
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer

from flashdrive_node.model import prompt as prompts
from flashdrive_node.model.tokenizer import byte_pair_tokenizer

SUBSET_FILE = Path(prompts.__file__).parent / "data" / "qwen_prompt_vocab.json"

#: In the order of their ids, which start behind the 151,643 byte-pair ranks.
QWEN_SPECIAL = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end")]
QWEN_SPECIAL += [f"<|{name}|>" for name in ("box_start", "box_end", "quad_start", "quad_end", "vision_start")]
QWEN_SPECIAL += [f"<|{name}|>" for name in ("vision_end", "vision_pad", "image_pad", "video_pad")]
QWEN_SPECIAL += ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
QWEN_SPECIAL += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

#: Text beside the fixed prompt texts whose words the subset knows; other words fall back to bytes.
INSTRUCTIONS = [
    "Turn left onto De La Cruz Boulevard in 40m",
    "Turn right onto Main Street in 30m",
    "Turn right in 30m",
    "Turn left",
    "Continue straight for 200m",
    "Go straight",
    "Keep left at the fork",
    "Keep right",
    "Take the exit in 500m",
    "Take the second exit at the roundabout",
    "Merge onto the highway",
    "Make a U-turn",
    "You have arrived at your destination",
    "Describe the scene.",
    "What should the vehicle do next and why?",
    "Is there a pedestrian ahead?",
    "Keep distance to the lead vehicle since it is slowing.",
    "Stop for the red traffic light ahead.",
    "Yield to the pedestrian who is crossing the road.",
]


def bytes_to_unicode() -> dict[int, str]:
    """A printable character for every byte, as byte-level tokenizer files spell them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def ranks() -> dict[str, int]:
    """Byte-pair tokens, spelled as tokenizer files spell them, and their ids."""
    spelling = bytes_to_unicode()
    lines = (files("dashscope") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    pairs = (line.split() for line in lines)
    return {"".join(spelling[b] for b in base64.b64decode(token)): int(rank) for token, rank in pairs}


@cache
def full_tokenizer_json() -> str:
    """The whole base vocabulary as tokenizer.json text."""
    vocab = ranks()
    merges = []
    # Ranks say which token may appear when, not which pair made it: every split into known parts is a merge.
    for token, rank in sorted(vocab.items(), key=lambda item: item[1]):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += sorted(
            (p for p in splits if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]])
        )
        assert rank < len(vocab)
    special = {text: len(vocab) + i for i, text in enumerate(QWEN_SPECIAL)}
    return byte_pair_tokenizer(vocab, merges, special).to_str()


def full_tokenizer() -> Tokenizer:
    """A fresh tokenizer with the whole base vocabulary of 151,669 ids."""
    return Tokenizer.from_str(full_tokenizer_json())


def fixed_texts() -> list[str]:
    """Every run of text that prompts are made of, and the examples above."""
    texts = [prompts.SYSTEM_TEXT, prompts.INSTRUCTION, "system\n", "\n", "user\n", "assistant\n", *INSTRUCTIONS]
    for name in prompts.CAMERA_NAMES:
        texts += [f"user\n{name}: frame 0 ", f"{name}: frame 0 ", f"{name}: ", f"user\n{name}: "]
    return texts + [f"frame {i} " for i in range(10)]


def merges_used(text: str) -> set[tuple[str, str]]:
    """Pairs that byte-pair encoding of one text joins."""
    vocab, words = ranks(), byte_pair_tokenizer({}, [], {}).pre_tokenizer
    used: set[tuple[str, str]] = set()
    for word, _ in words.pre_tokenize_str(text):
        parts = list(word)
        while True:
            pairs = [(vocab[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in vocab]
            if not pairs:
                break
            _, i = min(pairs)
            used.add((parts[i], parts[i + 1]))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return used


def subset_json() -> str:
    """tokenizer.json text of the subset: bytes, the merges of `fixed_texts`, and Qwen's special tokens, at real ids."""
    whole = ranks()
    pairs = sorted(set().union(*map(merges_used, fixed_texts())), key=lambda p: whole[p[0] + p[1]])
    vocab = {character: whole[character] for character in bytes_to_unicode().values()}
    vocab |= {a + b: whole[a + b] for a, b in pairs}
    special = {text: len(whole) + i for i, text in enumerate(QWEN_SPECIAL)}
    # Special tokens stand in the vocabulary too: an added token that is found there keeps that id.
    return byte_pair_tokenizer(vocab | special, pairs, special).to_str(pretty=True)


if __name__ == "__main__":
    SUBSET_FILE.write_text(subset_json() + "\n", encoding="utf-8")
