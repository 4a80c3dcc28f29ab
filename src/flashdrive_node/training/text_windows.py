"""What the language model was given when it answered: a prompt with its pictures, and the text that followed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from flashdrive_node.model.language import LanguageModel
from flashdrive_node.model.vision import VisionFeatures

#: One in so many windows chooses between what was learned, and is not learned from.
_CHOOSING = 5


@dataclass(frozen=True, eq=False)
class TextWindow:
    """Prompt and text of one window, on the host."""

    #: Token ids, int64 [T], and their positions on the three axes, int64 [3, T].
    ids: Tensor
    positions: Tensor
    #: Tokens of the prompt; the others were generated.
    prompt: int
    #: Of the image tokens, in the model's type, and where these stand, int64 [image tokens].
    features: VisionFeatures
    image_index: Tensor

    def to(self, device: torch.device) -> TextWindow:
        """The same on a device."""
        features = VisionFeatures(self.features.embeds.to(device), [x.to(device) for x in self.features.deepstack])
        return TextWindow(
            self.ids.to(device), self.positions.to(device), self.prompt, features, self.image_index.to(device)
        )

    def embedded(self, language: LanguageModel) -> Tensor:
        """What the first layer is given, [T, hidden]; on the window's device, which is the model's."""
        return embedding(self.ids, language.embed_tokens.weight).index_copy(0, self.image_index, self.features.embeds)

    def behind(self, layer: int, states: Tensor) -> Tensor:
        """States [T, hidden] behind a layer with the image features that are added there (DeepStack)."""
        if layer >= len(self.features.deepstack):
            return states
        return states.index_add(0, self.image_index, self.features.deepstack[layer])


def split_windows(windows: Sequence[TextWindow]) -> tuple[Sequence[TextWindow], Sequence[TextWindow]]:
    """Windows to learn from, and the last fifth, which chooses; of few windows the same ones do both."""
    learned = max(1, len(windows) - len(windows) // _CHOOSING)
    return windows[:learned], windows[learned:] or windows


@contextmanager
def recorded_window(language: LanguageModel) -> Iterator[list[TextWindow]]:
    """Watch a language model answer one window with one text; the list has it afterwards."""
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    prompt: list[Any] = []

    def show(_: nn.Module, given: tuple[Any, ...]) -> None:
        if not prompt:
            prompt.extend(given[4:6])
        ids.append(given[0].cpu())
        positions.append(given[1].cpu())

    found: list[TextWindow] = []
    handle = language.register_forward_pre_hook(show)
    try:
        yield found
    finally:
        handle.remove()
    features, index = prompt
    # Copies on the CPU, too: what inference made cannot be differentiated through.
    kept = VisionFeatures(_on_host(features.embeds), [_on_host(x) for x in features.deepstack])
    found.append(TextWindow(torch.cat(ids), torch.cat(positions, dim=1), len(ids[0]), kept, _on_host(index)))


def _on_host(x: Tensor) -> Tensor:
    """A copy."""
    return x.to("cpu", copy=True)
