"""Speculative decoding: a drafter guesses a block, the model checks it in one pass, and the output stays the model's.

At every position of a block the model's own token is taken (its likeliest, or one drawn from its distribution), and
guesses count while they equal it. So the text has exactly the distribution of one-at-a-time decoding, whatever the
drafter guesses; a bad drafter costs time only. Where a text ends, the cache holds what one-at-a-time decoding leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from flashdrive_node.engine.slot_pass import run_at_slots
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.attention import attend, group_mask
from flashdrive_node.model.inference import Context, Generated, StopRule
from flashdrive_node.model.sampling import SamplingSettings, sample

#: Guesses from the known token of each text, int64 [rows], and the context states [rows, context_length, context_size]:
#: int64 [rows, block - 1].
Propose = Callable[[Tensor, Tensor], Tensor]


class Taps:
    """Collects the outputs of some layers while tokens run: pass `observe`, then take `states`."""

    def __init__(self, layer_ids: tuple[int, ...], last: int | None = None):
        """Keep the last `last` tokens of a pass, by default all."""
        self._names = [f"layer_out.{i}" for i in layer_ids]
        self._last = last
        self._seen: dict[str, Tensor] = {}

    def observe(self, name: str, value: Tensor) -> None:
        """Called by the layers."""
        if name in self._names:
            # Copied: a layer's output is added to in place where image features come in behind it.
            self._seen[name] = (value if self._last is None else value[-self._last :]).clone()

    def states(self) -> Tensor:
        """Layers side by side in the order of their ids, [tokens, layers * hidden]."""
        return torch.cat([self._seen[name] for name in self._names], dim=-1)


@dataclass(frozen=True)
class DraftRule:
    """What a drafter is and how far it looks."""

    propose: Propose
    layer_ids: tuple[int, ...]
    #: Tokens per pass of the model: the known one and the guesses.
    block_size: int
    context_length: int
    #: After `closing` the text goes on with `stop` in a trained model: guessing so often saves the last pass.
    closing: int | None = None


@dataclass(frozen=True)
class Speculated:
    """Texts and how fast they came."""

    text: Generated
    #: Row that each slot behind the prefix belongs to, int64 [used - prefix].
    owners: Tensor
    #: Passes of the model over blocks of all rows.
    rounds: int
    #: Blocks of single rows that were looked at; a row that has ended is carried along unlooked.
    blocks: int

    @property
    def accept_length(self) -> float:
        """Tokens gained per block; 1 would be one-at-a-time decoding."""
        gained = sum(self.text.lengths) - len(self.text.lengths)  # the first of each row comes with the prefill
        return gained / self.blocks if self.blocks else 0.0


def slots_needed(rows: int, settings: SamplingSettings, block_size: int) -> int:
    """Cache slots that `decode` may touch behind the prefix."""
    return rows * (settings.max_length + block_size)


def decode(
    model: Alpamayo,
    context: Context,
    logits: Tensor,
    states: Tensor,
    rows: int,
    draft: DraftRule,
    settings: SamplingSettings,
    rule: StopRule,
    generator: torch.Generator | None = None,
) -> Speculated:
    """Generate texts from one prefix, a block of each per pass.

    While texts grow, each has a stretch of the cache for itself; shapes stay the same from pass to pass, a text that
    has ended is carried along. In the end texts lie behind each other, and the cache ends behind the last. A row's
    slots are those that `inference.decode` fills: up to and including the stop token, without the last token where
    the length limit or the end of turn cut the text.

    Args:
        model: The target.
        context: The prompt; its cache is extended in place.
        logits: Of the first token, float32 [1, vocabulary].
        states: Of `Taps` for the last `context_length` tokens of the prompt.
        rows: Texts to generate.
        draft: The drafter.
        settings: How tokens are drawn.
        rule: When a text ends.
        generator: Source of randomness on the model's device.
    """
    cache, prefix, size, device = context.cache, context.prefix, draft.block_size, logits.device
    stretch = settings.max_length + size
    cache.require(prefix + rows * stretch)
    # A masked slot still enters attention, with weight 0: it must hold a number.
    for tensor in (cache.keys, cache.values):
        tensor[:, :, prefix : prefix + rows * stretch].zero_()
    forbidden = forbidden_bias(model, rule)
    window = torch.arange(draft.context_length, device=device)
    states = states.expand(rows, -1, -1)
    known = sample((logits if forbidden is None else logits + forbidden).expand(rows, -1), settings, generator)
    texts = [[token] for token in known.tolist()]
    used = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of each text that are in the cache
    rounds = blocks = 0
    while running := [row for row in range(rows) if _ended(texts[row], settings.max_length, rule) is None]:
        block = torch.cat((known[:, None], draft.propose(known, states)), dim=1)
        if draft.closing is not None and rule.stop is not None:
            block[:, 1:] = torch.where(block[:, :-1] == draft.closing, rule.stop, block[:, 1:])
        hidden, new = run_blocks(model, context, block, used, stretch, draft.layer_ids)
        # The model's own token behind each token of a block, given that the block is right so far.
        own_logits = model.language.logits(hidden)
        own = sample(own_logits if forbidden is None else own_logits + forbidden, settings, generator).view(rows, size)
        accepted = (own[:, :-1] == block[:, 1:]).cumprod(dim=1).sum(dim=1)
        last = (window + accepted[:, None] + 1)[..., None].expand(-1, -1, states.shape[-1])
        states = torch.cat((states, new), dim=1).gather(1, last)
        known = own.gather(1, accepted[:, None])[:, 0]
        # Guesses behind are overwritten by the next block. A text that has ended stays within its stretch.
        used = (used + accepted + 1).clamp(max=settings.max_length - 1)
        drawn = torch.cat((own, accepted[:, None]), dim=1).tolist()  # the one read-back of a round
        for row in running:
            texts[row] += drawn[row][: drawn[row][-1] + 1]
        rounds += 1
        blocks += len(running)
    return _finish(model, context, texts, stretch, settings, rule, rounds, blocks)


def _finish(
    model: Alpamayo,
    context: Context,
    texts: list[list[int]],
    stretch: int,
    settings: SamplingSettings,
    rule: StopRule,
    rounds: int,
    blocks: int,
) -> Speculated:
    """Cut texts at their ends, complete their slots, and lay them behind each other."""
    cache, prefix, device = context.cache, context.prefix, model.device
    in_cache = [len(text) - 1 for text in texts]  # all but the model's own last token
    texts = [text[: _ended(text, settings.max_length, rule)] for text in texts]
    stopped = [text[-1] == rule.stop for text in texts]
    slots = [
        len(text) if stop and len(text) < settings.max_length else len(text) - 1
        for text, stop in zip(texts, stopped, strict=True)
    ]
    if any(have < need for have, need in zip(in_cache, slots, strict=True)):
        # The stop token came as the model's own behind a block: only it is missing. Other rows go to an unused slot.
        places = [n - 1 if have < n else stretch - 1 for have, n in zip(in_cache, slots, strict=True)]
        tail = torch.tensor([text[-1:] for text in texts], device=device)
        run_blocks(model, context, tail, torch.tensor(places, device=device), stretch, ())
    rows = range(len(texts))
    if len(texts) > 1:
        filled = torch.cat([torch.arange(n) + prefix + row * stretch for row, n in zip(rows, slots, strict=True)])
        filled = filled.to(device)
        for tensor in (cache.keys, cache.values):
            tensor[:, :, prefix : prefix + len(filled)] = tensor[:, :, filled]
    cache.used = prefix + sum(slots)
    longest = max(len(t) for t in texts)
    padded = torch.tensor([t + [rule.pad] * (longest - len(t)) for t in texts], device=device)
    text = Generated(padded, tuple(len(t) for t in texts), tuple(stopped))
    owners = torch.tensor([row for row, n in zip(rows, slots, strict=True) for _ in range(n)], device=device)
    return Speculated(text, owners, rounds, blocks)


def forbidden_bias(model: Alpamayo, rule: StopRule) -> Tensor | None:
    """What keeps forbidden tokens from being drawn: added to logits, [vocabulary]."""
    if rule.forbidden is None:
        return None
    first, count = rule.forbidden
    bias = torch.zeros(model.config.tokens.vocab_size, device=model.device)
    bias[first : first + count] = -torch.inf
    return bias


def run_blocks(
    model: Alpamayo, context: Context, block: Tensor, used: Tensor, stretch: int, layer_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Run a block of tokens of each text, causal within the text.

    Args:
        model: The target.
        context: Texts stand in its cache behind the prompt, each in a stretch of its own.
        block: int64 [rows, block].
        used: Tokens of each text in front of its block, int64 [rows].
        stretch: Slots per text.
        layer_ids: Layers to tap.

    Returns:
        Hidden states behind the final norm [rows * block, hidden], and tapped states [rows, block, context_size].
    """
    prefix, language, (rows, size) = context.prefix, model.language, block.shape
    device = block.device
    index = used[:, None] + torch.arange(size, device=device)  # of each token in its text, [rows, block]
    row = torch.arange(rows, device=device)
    slots = (prefix + row[:, None] * stretch + index).flatten()
    behind = torch.arange(rows * stretch, device=device)
    own = (behind // stretch == row[:, None, None]) & (behind % stretch <= index[..., None])
    own = own.flatten(0, 1)  # [rows * block, rows * stretch]
    seen = torch.cat((torch.ones(len(slots), prefix, dtype=torch.bool, device=device), own), dim=1)
    mask = group_mask(seen, model.config.text.group_size, model.dtype)
    end = prefix + rows * stretch
    taps = Taps(layer_ids)
    hidden = run_at_slots(
        language,
        embedding(block.flatten(), language.embed_tokens.weight),
        (index.flatten() + (prefix + context.rope_delta)).expand(3, -1),
        slots,
        context.cache,
        lambda q, keys, values: attend(q, keys[:, :end], values[:, :end], mask),
        observe=taps.observe if layer_ids else None,
    )
    states = taps.states() if layer_ids else hidden[:, :0]
    return language.norm(hidden), states.unflatten(0, (rows, size))


def _ended(tokens: list[int], max_length: int, rule: StopRule) -> int | None:
    """Tokens up to where the text ends, or None while it goes on."""
    for i, token in enumerate(tokens[:max_length]):
        if token in (rule.stop, rule.end_of_turn):
            return i + 1
    return max_length if len(tokens) >= max_length else None
