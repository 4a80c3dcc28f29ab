"""What routine drafters are shown of recorded prompts, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdrive_node.engine.drafter_config import DrafterConfig
from flashdrive_node.engine.prompt_slots import PromptView, cell_count, place_slots
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.prompt import Prompt
from flashdrive_node.training.text_records import TextRecords


class PromptViews:
    """Views of the prompts of some records, for one drafter."""

    def __init__(self, records: TextRecords, prompt: Prompt, config: DrafterConfig, room: int):
        """Lay their slots out; prompts differ by the length of their navigation text alone.

        Args:
            records: With states of so many last tokens of every prompt.
            prompt: Of all of them, without navigation text.
            config: What is looked at.
            room: Of `prompt_room`.

        Raises:
            InputError: The records hold too few states, or no cells of images that the drafter looks at.
        """
        cells = cell_count(prompt, config)
        if records.lead < room or (cells and records.cells.shape[1] != cells):
            raise InputError(
                f"records with {room} states in front of a text and {cells} image cells are required, found "
                f"{records.lead} and {records.cells.shape[1]}"
            )
        self.records, self.room, self.cells = records, room, cells
        lengths, self._layout = records.navigation.unique(return_inverse=True)
        slots = [place_slots(prompt, config, room, int(n)) for n in lengths.tolist()]
        device = records.tokens.device
        self._kinds = torch.stack([s.kinds for s in slots]).to(device)
        self._positions = torch.stack([s.positions for s in slots]).to(device)
        self._base = torch.tensor([s.base for s in slots], device=device)

    def view(self, rows: Tensor) -> PromptView:
        """Of these rows, int64 [P]."""
        records, layout = self.records, self._layout[rows]
        return PromptView(
            records.states[rows, records.lead - self.room : records.lead],
            records.cells[rows, : self.cells],
            self._kinds[layout],
            self._positions[layout],
            self._base[layout],
        )


def views_of(records: TextRecords, prompt: Prompt | None, config: DrafterConfig, room: int) -> PromptViews | None:
    """Views for a routine drafter; DFlash looks at none.

    Raises:
        InputError: The prompt is not known, or as in `PromptViews`.
    """
    if config.variant == "dflash":
        return None
    if prompt is None:
        raise InputError("records of windows are required for a routine drafter, found none written yet")
    return PromptViews(records, prompt, config, room)
