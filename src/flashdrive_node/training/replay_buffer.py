"""Rendered windows in the memory of the GPU, from which training batches are drawn several times."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashdrive_node.evaluation.history_baseline import route_features
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.prompt_batch import PromptLayout
from flashdrive_node.model.tokenizer import AlpamayoTokenizer
from flashdrive_node.training.pictures import Pictures
from flashdrive_node.training.windows import Windows

#: What follows a sentence in the model's answer.
ANSWER_END = "<|cot_end|><|traj_future_start|>"
#: Tokens of the longest navigation instruction with its delimiters, and of the longest answer.
_ROUTE_TOKENS, ANSWER_TOKENS = 11, 40


class Batch(NamedTuple):
    """B training samples."""

    #: Of `Pictures`.
    images: Tensor
    classes: Tensor
    log_distance: Tensor
    #: Prompt and answer, int64 [B, T], padded on the right; tokens of the prompt and of both, int64 [B].
    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    #: Normalised actions, float32 [B, 64, 2].
    actions: Tensor
    #: Of `Windows`.
    decision: Tensor
    geometry: Tensor
    geometry_known: Tensor
    history_xyz: Tensor
    history_rot: Tensor
    #: At t0, float32 [B], m/s.
    speed: Tensor
    #: Navigation instruction in numbers, float32 [B, 4], see `route_features`.
    route: Tensor


class Scribe:
    """Turns windows and their pictures into training samples."""

    def __init__(self, layout: PromptLayout, model: Alpamayo, tokenizer: AlpamayoTokenizer):
        """Keep the prompt's layout, the model's normalisation of actions, and the tokenizer."""
        self.layout, self.config, self.tokenizer = layout, model.config, tokenizer
        self.action_space = model.action_space
        longest = layout.history_span[1] + 1 + _ROUTE_TOKENS + layout.tail_length + ANSWER_TOKENS
        #: Tokens of a row, the same for all batches.
        self.width = -(-longest // 16) * 16
        self._answers: dict[str, list[int]] = {}

    def write(self, windows: Windows, pictures: Pictures) -> Batch:
        """Samples of windows that are on the layout's device."""
        history = encode_history(windows.history_xyz, windows.history_rot, self.config)
        answers = [self.answer(sentence) for sentence in windows.sentences]
        prompts = self.layout.build(history, windows.navigation, answers, self.width)
        constants = self.action_space.constants
        mean, std = constants[0::2], constants[1::2]
        return Batch(
            *pictures,
            prompts.ids,
            prompts.prompt_lengths,
            prompts.lengths,
            (windows.actions - mean) / std,
            windows.decision,
            windows.geometry,
            windows.geometry_known,
            windows.history_xyz,
            windows.history_rot,
            self.action_space.initial_speed(windows.history_xyz, windows.history_rot),
            route_features(windows.navigation).to(self.layout.device),
        )

    def answer(self, sentence: str) -> list[int]:
        """Tokens that the model is to generate."""
        if sentence not in self._answers:
            self._answers[sentence] = self.tokenizer.encode(sentence + ANSWER_END)
        return self._answers[sentence]


class ReplayBuffer:
    """A ring of samples; new ones replace the oldest."""

    def __init__(self, capacity: int):
        """Memory is taken when the first samples come, about 2.2 MB each."""
        self.capacity, self.written = capacity, 0
        self._columns: list[Tensor] = []

    def __len__(self) -> int:
        return min(self.written, self.capacity)

    def add(self, samples: Batch) -> None:
        """Put samples in.

        Raises:
            ValueError: More than the buffer holds.
        """
        count = len(samples.lengths)
        if count > self.capacity:
            raise ValueError(f"at most {self.capacity} samples at a time are required, found {count}")
        if not self._columns:
            self._columns = [t.new_empty((self.capacity, *t.shape[1:])) for t in samples]
        at = (torch.arange(count, device=samples.lengths.device) + self.written) % self.capacity
        for column, new in zip(self._columns, samples, strict=True):
            column[at] = new
        self.written += count

    def sample(self, count: int, generator: torch.Generator) -> Batch:
        """Samples drawn at random, each equally likely."""
        rows = torch.randint(len(self), (count,), device=generator.device, generator=generator)
        return self.rows(rows)

    def rows(self, rows: Tensor) -> Batch:
        """Samples at these places."""
        return Batch(*(column[rows] for column in self._columns))
