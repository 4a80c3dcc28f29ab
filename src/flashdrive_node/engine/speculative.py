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

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.decoder import Observe
from flashdrive_node.model.inference import Context, Generated, StopRule
from flashdrive_node.model.language import causal_mask
from flashdrive_node.model.sampling import SamplingSettings, sample

#: Guesses from the known token, int64 [1], and the context states [context_length, context_size]: int64 [block - 1].
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
    #: Passes of the model over a block, all rows together.
    rounds: int

    @property
    def accept_length(self) -> float:
        """Tokens gained per pass; 1 would be one-at-a-time decoding."""
        gained = sum(self.text.lengths) - len(self.text.lengths)  # the first of each row comes with the prefill
        return gained / self.rounds if self.rounds else 0.0


def slots_needed(rows: int, settings: SamplingSettings, block_size: int) -> int:
    """Cache slots that `decode` may touch behind the prefix."""
    return rows * settings.max_length + block_size


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
    """Generate texts from one prefix, one after the other.

    The cache ends behind the last text; texts lie behind each other, `Speculated.owners` says whose each slot is. A
    row's slots are those that `inference.decode` fills: up to and including the stop token, without the last token
    where the length limit or the end of turn cut the text.

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
    cache, prefix = context.cache, context.prefix
    cache.require(prefix + slots_needed(rows, settings, draft.block_size))
    forbidden = forbidden_bias(model, rule)
    texts: list[list[int]] = []
    kept: list[tuple[Tensor, Tensor]] = []
    slots: list[int] = []
    rounds = 0
    for _ in range(rows):
        cache.used = prefix
        tokens, passes = _decode_row(model, context, logits, states, draft, settings, rule, forbidden, generator)
        texts.append(tokens)
        rounds += passes
        slots.append(cache.used - prefix)
        if rows > 1:  # the next row is decoded in the same place
            kept.append(
                (cache.keys[:, :, prefix : cache.used].clone(), cache.values[:, :, prefix : cache.used].clone())
            )
    if rows > 1:
        cache.used = prefix
        for keys, values in kept:
            end = cache.used + keys.shape[2]
            cache.keys[:, :, cache.used : end].copy_(keys)
            cache.values[:, :, cache.used : end].copy_(values)
            cache.used = end
    longest = max(len(t) for t in texts)
    padded = torch.tensor([t + [rule.pad] * (longest - len(t)) for t in texts], device=logits.device)
    text = Generated(padded, tuple(len(t) for t in texts), tuple(t[-1] == rule.stop for t in texts))
    owners = torch.arange(rows, device=logits.device).repeat_interleave(torch.tensor(slots, device=logits.device))
    return Speculated(text, owners, rounds)


def forbidden_bias(model: Alpamayo, rule: StopRule) -> Tensor | None:
    """What keeps forbidden tokens from being drawn: added to logits, [vocabulary]."""
    if rule.forbidden is None:
        return None
    first, count = rule.forbidden
    bias = torch.zeros(model.config.tokens.vocab_size, device=model.device)
    bias[first : first + count] = -torch.inf
    return bias


def _decode_row(
    model: Alpamayo,
    context: Context,
    logits: Tensor,
    states: Tensor,
    draft: DraftRule,
    settings: SamplingSettings,
    rule: StopRule,
    forbidden: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[list[int], int]:
    """One text; the cache ends behind it. Returns its tokens and the passes over a block."""
    cache, prefix, size, device = context.cache, context.prefix, draft.block_size, logits.device
    steps = torch.arange(size, device=device)
    window = torch.arange(draft.context_length, device=device)
    known = sample(logits if forbidden is None else logits + forbidden, settings, generator)
    tokens: list[int] = known.tolist()
    rounds = 0
    while (length := _ended(tokens, settings.max_length, rule)) is None:
        block = torch.cat((known, draft.propose(known, states)))
        if draft.closing is not None and rule.stop is not None:
            block[1:] = torch.where(block[:-1] == draft.closing, rule.stop, block[1:])
        start = cache.used
        hidden, new = run_block(model, context, block, steps, draft.layer_ids)
        # The model's own token behind each token of the block, given that the block is right so far.
        own_logits = model.language.logits(hidden)
        own = sample(own_logits if forbidden is None else own_logits + forbidden, settings, generator)
        accepted = (own[:-1] == block[1:]).cumprod(dim=0).sum()
        states = torch.cat((states, new)).index_select(0, window + accepted + 1)
        known = own.index_select(0, accepted[None])
        *drawn, count = torch.cat((own, accepted[None])).tolist()  # the one read-back of a round
        tokens += drawn[: count + 1]
        cache.used = start + count + 1  # guesses behind are overwritten by the next block
        rounds += 1
    stopped, tokens = tokens[length - 1] == rule.stop, tokens[:length]
    slots = length if stopped and length < settings.max_length else length - 1
    if cache.used < prefix + slots:  # the stop token came as the model's own behind a block: only it is missing
        run_block(model, context, torch.tensor(tokens[-1:], device=device), steps[:1], ())
    cache.used = prefix + slots
    return tokens, rounds


def run_block(
    model: Alpamayo, context: Context, block: Tensor, steps: Tensor, layer_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Run a block of tokens behind the cache's end: hidden states [block, hidden], and the tapped states."""
    cache = context.cache
    start = cache.used
    taps = Taps(layer_ids)
    observe: Observe | None = taps.observe if layer_ids else None
    mask = causal_mask(start, len(block), block.device) if len(block) > 1 else None
    positions = (steps + (start + context.rope_delta)).expand(3, -1)
    hidden = model.language(block, positions, cache, mask, observe=observe)
    return hidden, taps.states() if layer_ids else hidden[:, :0]


def _ended(tokens: list[int], max_length: int, rule: StopRule) -> int | None:
    """Tokens up to where the text ends, or None while it goes on."""
    for i, token in enumerate(tokens[:max_length]):
        if token in (rule.stop, rule.end_of_turn):
            return i + 1
    return max_length if len(tokens) >= max_length else None
