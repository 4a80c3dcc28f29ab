"""What a routine drafter takes in of every window's prompt, in buffers that stay in place for graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.engine.drafter import Drafter, PromptMemory
from flashdrive_node.engine.prompt_slots import PromptView, cell_count, cell_weights, place_slots
from flashdrive_node.engine.stream import Stream
from flashdrive_node.model.prompt import Prompt


class PromptReader:
    """Reads the parts of a prompt that a drafter looks at from a stream's state.

    `place` says on the host where they stand; `read` is then work for the device alone, and fills `memory`.
    """

    def __init__(self, drafter: Drafter, stream: Stream, room: int):
        """Args: the drafter, with parts; the stream, which taps `room` tokens of every prompt."""
        self.drafter, self.stream, self.room = drafter, stream, room
        #: Of the last prompt that was read. A prompt with another number of images takes new buffers.
        self.memory: PromptMemory | None = None
        self._view: PromptView | None = None
        self._weights: Tensor | None = None
        self._placed: Prompt | None = None

    def place(self, prompt: Prompt) -> None:
        """Take a window's layout in, behind which `read` comes."""
        config = self.drafter.config
        cells = cell_count(prompt, config)
        if self._view is None or self._view.cells.shape[1] != cells:
            self._allocate(cells, len(prompt.image_index))
        if self._placed is prompt:
            return
        assert self._view is not None
        slots = place_slots(prompt, config, self.room)
        self._view.kinds.copy_(slots.kinds, non_blocking=True)
        self._view.positions.copy_(slots.positions, non_blocking=True)
        self._view.base.fill_(slots.base)
        if self._weights is not None:
            weights = cell_weights(prompt, config.image_cells)
            if weights.shape != self._weights.shape:
                self._weights = torch.empty_like(weights, device=self._view.base.device, dtype=self.stream.model.dtype)
                self.memory = None  # graphs have the old ones
            self._weights.copy_(weights, non_blocking=True)
        self._placed = prompt
        if self.memory is None:
            self.memory = self._empty_memory()

    def read(self) -> None:
        """Fill `memory` from the stream's state behind a prefill."""
        view, states = self._view, self.stream.states
        assert view is not None
        assert states is not None
        assert self.memory is not None
        view.states.copy_(states[-self.room :])
        if self._weights is not None:
            torch.matmul(self._weights, self.stream.embeddings(self._weights.shape[1]), out=view.cells[0])
        for kept, new in zip(self.memory, self.drafter.read(view), strict=True):
            kept.copy_(new)

    def _allocate(self, cells: int, tokens: int) -> None:
        model, config = self.stream.model, self.drafter.config
        device, dtype, slots = model.device, model.dtype, cells + self.room
        self._view = PromptView(
            states=torch.zeros(1, self.room, config.context_size, device=device, dtype=dtype),
            cells=torch.zeros(1, cells, model.config.text.hidden_size, device=device, dtype=dtype),
            kinds=torch.zeros(1, slots, dtype=torch.int64, device=device),
            positions=torch.zeros(1, 3, slots, device=device),
            base=torch.zeros(1, dtype=torch.int64, device=device),
        )
        self._weights = torch.empty(cells, tokens, device=device, dtype=dtype) if cells else None
        self._placed = self.memory = None

    def _empty_memory(self) -> PromptMemory:
        assert self._view is not None
        return PromptMemory(*(torch.zeros_like(t) for t in self.drafter.read(self._view)))
