"""Driving prompts of many windows that share cameras, frames and image size.

Images stand in front of everything that differs (ego history, navigation text, reasoning), so rows differ only in what
follows and in their lengths: they are padded on the right, share one table of positions, and need no mask in a causal
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.errors import PromptError
from flashdrive_node.model.prompt import MAX_NAV_CHARACTERS, MAX_NAV_TOKENS, driving_prompt
from flashdrive_node.model.tokenizer import AlpamayoTokenizer


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Token ids of B rows, padded on the right."""

    #: int64 [B, T].
    ids: Tensor
    #: Tokens of each row's prompt, and with the text behind it: int64 [B].
    prompt_lengths: Tensor
    lengths: Tensor


class PromptLayout:
    """Builds the prompts of one image layout, the same ids that `driving_prompt` and `fuse_history` give."""

    def __init__(
        self,
        tokenizer: AlpamayoTokenizer,
        config: AlpamayoConfig,
        camera_indices: Sequence[int],
        frames_per_camera: int,
        grid: tuple[int, int],
        device: torch.device | str = "cpu",
    ):
        """Arguments as in `driving_prompt`; `grid` is that of every image.

        Raises:
            PromptError: Cameras or frames that no prompt can be built from.
        """
        grids = [grid] * (len(camera_indices) * frames_per_camera)
        prompt = driving_prompt(tokenizer, config, camera_indices, frames_per_camera, grids)
        assert prompt.history_span is not None
        self.tokenizer = tokenizer
        #: Without navigation text and history.
        self.prompt = prompt
        self.supports_navigation = config.supports_navigation
        self.device = torch.device(device)
        #: That of every row, without history and navigation text.
        self.prompt = prompt
        self.rope_delta = prompt.rope_delta
        #: First index of the history tokens and the index behind the last.
        self.history_span = prompt.history_span
        #: Indices of all image tokens, int64 [image tokens].
        self.image_index = prompt.image_index.to(self.device)
        # Behind the token that closes the history comes the navigation text, if any.
        split = prompt.history_span[1] + 1
        self._head = prompt.ids[:split].to(self.device)
        self._tail = prompt.ids[split:].tolist()
        self._positions = prompt.positions.to(self.device)
        self._pad = tokenizer.id("endoftext")
        self._routes: dict[str, list[int]] = {}

    @property
    def tail_length(self) -> int:
        """Tokens of the prompt behind history and navigation text."""
        return len(self._tail)

    def positions(self, length: int) -> Tensor:
        """M-RoPE positions of the first `length` tokens of any row: int64 [3, length]."""
        known = self._positions[:, : min(length, self._head.shape[0])]
        rest = torch.arange(known.shape[1], length, device=self.device) + self.rope_delta
        return torch.cat((known, rest.expand(3, -1)), dim=1)

    def build(
        self,
        history_tokens: Tensor,
        nav_texts: Sequence[str | None],
        texts: Sequence[Sequence[int]] | None = None,
        width: int | None = None,
    ) -> PromptBatch:
        """Prompts of B rows.

        Args:
            history_tokens: Of `encode_history`, int64 [B, history tokens].
            nav_texts: Untrusted navigation instruction per row, or None.
            texts: Token ids that follow each prompt, for training.
            width: T; by default that of the longest row.

        Raises:
            PromptError: A navigation text that cannot be used, or a row longer than `width`.
        """
        rows = len(nav_texts)
        start, end = self.history_span
        if history_tokens.shape != (rows, end - start):
            raise PromptError(
                f"history tokens [{rows}, {end - start}] are required, found {list(history_tokens.shape)}"
            )
        prompts = [self._route(nav) + self._tail for nav in nav_texts]
        behind = prompts if texts is None else [p + list(t) for p, t in zip(prompts, texts, strict=True)]
        head = self._head.shape[0]
        longest = head + max(map(len, behind))
        width = longest if width is None else width
        if longest > width:
            raise PromptError(f"prompt: at most {width} tokens are required, found {longest}")
        padded = [row + [self._pad] * (width - head - len(row)) for row in behind]
        tail = torch.tensor(padded).to(self.device)
        ids = torch.cat((self._head.expand(rows, -1), tail), dim=1)
        ids[:, start:end] = history_tokens
        counts = torch.tensor([[head + len(p) for p in prompts], [head + len(b) for b in behind]]).to(self.device)
        return PromptBatch(ids, counts[0], counts[1])

    def _route(self, nav_text: str | None) -> list[int]:
        if nav_text is None:
            return []
        if not self.supports_navigation:
            raise PromptError("navigation text needs Alpamayo 1.5")
        if nav_text not in self._routes:
            encode = self.tokenizer.encode_untrusted
            text = encode(nav_text, "navigation text", MAX_NAV_CHARACTERS, MAX_NAV_TOKENS)
            if len(self._routes) > 4096:
                self._routes.clear()
            self._routes[nav_text] = [self.tokenizer.id("route_start"), *text, self.tokenizer.id("route_end")]
        return self._routes[nav_text]
