"""Whether the output head may have 4 bits: whether texts stay what they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.int4_linear import Int4Linear
from flashdrive_node.training.layer_inputs import LayerInputs

#: Name of the head in the model.
HEAD = "language.lm_head"
#: States that the head is checked with at once.
_ROWS = 256


@dataclass(frozen=True)
class HeadCheck:
    """The output head in 4 bits against the original: the likeliest token behind every token of the windows' texts."""

    tokens: int
    changed: int
    #: Whether 4 bits were kept; else the head has 8.
    kept: bool


@torch.no_grad()
def check_head(model: Alpamayo, met: LayerInputs) -> HeadCheck:
    """Whether greedy texts stay what they are with the head in 4 bits.

    They do if no state that the head met has another likeliest token, because each text is then the same token by
    token. Trajectory tokens, which are never generated, do not count.

    Args:
        model: With a plain head.
        met: With rows of the head's inputs.
    """
    rows = torch.cat((met.fit[HEAD], met.held_out[HEAD])).to(model.device, model.dtype)
    tokens = model.config.tokens
    head = model.language.lm_head
    small, changed = Int4Linear(head), 0
    for part in rows.split(_ROWS):
        exact, found = (module(part).float() for module in (head, small))
        for logits in (exact, found):
            logits[:, tokens.traj_token_start : tokens.traj_token_start + tokens.traj_vocab_size] = -torch.inf
        changed += int((exact.argmax(dim=-1) != found.argmax(dim=-1)).sum())
    return HeadCheck(len(rows), changed, kept=changed == 0)
