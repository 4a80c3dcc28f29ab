"""The stages of one inference, as free functions over one context: encode, prefill, decode, act.

Several samples share one vision pass and one prefix. Sample j of n writes its t-th generated token to cache slot
``prefix + t n + j``, so slots fill from the front whatever the texts' lengths are, and a mask tells the samples apart.
With one sample every slot is its own and no mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.model.action_space import Path
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.decoder import Observe
from flashdrive_node.model.flow_matching import Velocity, guided, integrate
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.language import causal_mask
from flashdrive_node.model.rope import mrope_cos_sin
from flashdrive_node.model.sampling import SamplingSettings, sample
from flashdrive_node.model.vision import VisionFeatures


@dataclass(frozen=True)
class StopRule:
    """When a generated text ends."""

    #: Its cache entry is part of the context that the expert sees (``<|traj_future_start|>``), or None for a question.
    stop: int | None
    #: Ends a row at once (``<|im_end|>``).
    end_of_turn: int
    #: Fills rows that have ended while others go on.
    pad: int
    #: First id and number of the discrete trajectory tokens, which are never generated; None allows them.
    forbidden: tuple[int, int] | None = None


@dataclass(frozen=True)
class Context:
    """A prompt in the cache."""

    cache: KVCache
    #: Slots that the prompt takes.
    prefix: int
    #: Position of a generated token minus its index in the sequence, the same on all three axes.
    rope_delta: int


@dataclass(frozen=True)
class Generated:
    """Generated tokens of n rows."""

    #: [rows, steps]; behind a row's end stands what the loop fed or drew, which nothing looks at.
    tokens: Tensor
    #: Tokens per row that count: up to and including the stop token, or all where there is none.
    lengths: tuple[int, ...]
    #: Rows that reached the stop token.
    stopped: tuple[bool, ...]

    def rows(self) -> list[list[int]]:
        """The tokens that count, row by row."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths, strict=True)]


def new_cache(model: Alpamayo, prompt: int, samples: int, max_length: int) -> KVCache:
    """A cache for one prompt, the longest texts, and the expert's waypoints."""
    slots = prompt + samples * (max_length + model.config.action_space.n_waypoints)
    return KVCache(model.config.text, slots, model.device, model.dtype)


def prefill(
    model: Alpamayo,
    ids: Tensor,
    positions: Tensor,
    rope_delta: int,
    cache: KVCache,
    features: VisionFeatures,
    image_index: Tensor,
    observe: Observe | None = None,
) -> tuple[Context, Tensor]:
    """Run a prompt through the language model.

    Args:
        model: The network.
        ids: Prompt ids with history tokens filled in and image tokens expanded, int64 [T].
        positions: int64 [3, T].
        rope_delta: See `Context`.
        cache: Used from its first slot on.
        features: Vision features of the prompt's images.
        image_index: Indices of the image tokens, int64 [image tokens].
        observe: See `run_layers`; also "final_hidden_last".

    Returns:
        The context and the logits of the first generated token, float32 [1, vocabulary].
    """
    cache.used = 0
    hidden = model.language(ids, positions, cache, None, features, image_index, observe)[-1:]
    if observe:
        observe("final_hidden_last", hidden)
    return Context(cache, ids.shape[0], rope_delta), model.language.logits(hidden)


def prefill_without_navigation(
    model: Alpamayo, context: Context, ids: Tensor, positions: Tensor, rope_delta: int, shared: int, samples: int
) -> tuple[Context, Tensor]:
    """The second context of navigation guidance: the prompt without its navigation text.

    Everything in front of that text is the same in both, so those slots are copied and only the tail is computed.

    Args:
        model: The network.
        context: The prompt with navigation text.
        ids, positions, rope_delta: The prompt without it.
        shared: Tokens in front of the navigation text.
        samples: Rows that will be generated.

    Returns:
        The context and the hidden state of its last token, [1, hidden].
    """
    generated = context.cache.slots - context.prefix
    cache = KVCache(model.config.text, ids.shape[0] + generated, model.device, model.dtype)
    cache.copy_prefix(context.cache, shared)
    mask = causal_mask(shared, ids.shape[0] - shared, ids.device)
    hidden = model.language(ids[shared:], positions[:, shared:], cache, mask)
    return Context(cache, ids.shape[0], rope_delta), hidden[-1:]


def row_mask(prefix: int, rows: int, steps: int, device: torch.device) -> Tensor:
    """True where row j may look among the prefix and the slots of `steps` generated tokens: [rows, prefix + ...]."""
    row = torch.arange(rows, device=device)
    own = row[:, None] == row.repeat(steps)[None, :]
    return torch.cat((torch.ones(rows, prefix, dtype=torch.bool, device=device), own), dim=1)


def decode(
    model: Alpamayo,
    context: Context,
    logits: Tensor,
    rows: int,
    settings: SamplingSettings,
    rule: StopRule,
    generator: torch.Generator | None = None,
    script: Tensor | None = None,
    observe: Observe | None = None,
) -> Generated:
    """Generate text, token by token.

    The stop token is run through the model as well, because the expert attends to it. A row without a stop token
    within `max_length` keeps its tokens, the last of which is not run, as in the reference.

    Args:
        model: The network.
        context: The prompt; its cache is extended in place.
        logits: Of the first token, float32 [1, vocabulary].
        rows: Texts to generate from the one prefix.
        settings: How tokens are drawn.
        rule: When a text ends.
        generator: Source of randomness on the model's device.
        script: Tokens to take in place of the drawn ones, [rows, steps], padded behind each row's end.
        observe: Receives "logits_masked" [rows, vocabulary], "final_hidden_last" and "position" per step; then the
            step behind the last stop token is computed too, which nothing else needs.
    """
    device = logits.device
    mask = row_mask(context.prefix, rows, settings.max_length, device) if rows > 1 else None
    logits = logits.expand(rows, -1)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)  # by end of turn
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    while True:
        logits = forbid(logits, rule)
        if observe:
            observe("logits_masked", logits)
        step = len(tokens)
        token = sample(logits, settings, generator)
        if script is not None:
            token = script[:, step] if step < script.shape[1] else torch.full_like(token, rule.pad)
        token = torch.where(ended, rule.pad, token)
        tokens.append(token)
        finished_before = bool((stopped | ended).all())
        ended |= token == rule.end_of_turn
        if rule.stop is not None:
            stopped |= token == rule.stop
        if finished_before or step + 1 == settings.max_length or bool(ended.all()):
            break
        position = torch.full((3, rows), context.prefix + step + context.rope_delta, device=device)
        slots = context.cache.used + rows
        hidden = model.language(token, position, context.cache, None if mask is None else mask[:, :slots])
        if observe:
            observe("position", position)
            observe("final_hidden_last", hidden)
        elif bool((stopped | ended).all()):
            break
        logits = model.language.logits(hidden)
    return collect_generated(torch.stack(tokens, dim=1), rule)


def forbid(logits: Tensor, rule: StopRule) -> Tensor:
    """Logits [rows, vocabulary] with the tokens that are never generated at -inf."""
    if rule.forbidden is None:
        return logits
    first, count = rule.forbidden
    logits = logits.clone()
    logits[:, first : first + count] = -torch.inf
    return logits


def collect_generated(tokens: Tensor, rule: StopRule) -> Generated:
    """What counts of generated tokens [rows, steps]."""
    lengths, stopped = [], []
    for row in tokens.tolist():
        ends = [row.index(t) + 1 for t in (rule.stop, rule.end_of_turn) if t is not None and t in row]
        lengths.append(min(ends, default=len(row)))
        stopped.append(rule.stop is not None and row[lengths[-1] - 1] == rule.stop)
    return Generated(tokens, tuple(lengths), tuple(stopped))


def repeat_text(model: Alpamayo, context: Context, text: Generated, columns: int | None = None) -> Tensor:
    """Put texts that another context generated behind this one, in one pass.

    Args:
        model: The network.
        context: Extended in place.
        text: What to append.
        columns: Tokens per row to append; by default the longest row's. Those behind a row's end are hidden from all.

    Returns:
        Hidden states [columns, rows, hidden].
    """
    rows, device = text.tokens.shape[0], text.tokens.device
    columns = columns or max(text.lengths)
    tokens = text.tokens[:, :columns].T.reshape(-1)  # slot order: step by step, row by row
    step = torch.arange(columns, device=device).repeat_interleave(rows)
    row = torch.arange(rows, device=device).repeat(columns)
    counts = step < torch.tensor(text.lengths, device=device)[row]
    own = (row[:, None] == row[None, :]) & (step[None, :] <= step[:, None]) & counts[None, :]
    mask = torch.cat((torch.ones(len(step), context.prefix, dtype=torch.bool, device=device), own), dim=1)
    positions = (context.prefix + step + context.rope_delta).expand(3, -1)
    return model.language(tokens, positions, context.cache, mask).unflatten(0, (columns, rows))


def velocity_field(
    model: Alpamayo,
    context: Context,
    text: Generated,
    observe: Observe | None = None,
) -> Velocity:
    """The expert on one context, for all rows at once.

    Row j's waypoints see the prefix, their own text up to its end, and each other. Their positions go on behind the
    text's end.

    Args:
        model: The network.
        context: Prompt and generated texts.
        text: The texts, for where each ends.
        observe: Receives "position", "attend" once, and what `ActionExpert.forward` gives at every step.

    Returns:
        Velocity on [rows, waypoints, 2].
    """
    rows, device, waypoints = len(text.lengths), model.device, model.config.action_space.n_waypoints
    used = context.cache.used
    offsets = context.prefix + torch.tensor(text.lengths, device=device)
    first = (offsets + context.rope_delta)[:, None]
    positions = (first + torch.arange(waypoints, device=device)).reshape(-1).expand(3, -1)
    cos, sin = mrope_cos_sin(positions, model.config.expert, model.dtype)
    mask = None
    # One text whose every slot counts needs no mask; a context with slots behind the text's end does.
    if rows > 1 or used - context.prefix > text.lengths[0]:
        row = torch.arange(rows, device=device)
        slot = torch.arange(used - context.prefix, device=device)
        own_text = (slot % rows == row[:, None]) & (slot // rows < (offsets - context.prefix)[:, None])
        prefix = torch.ones(rows, context.prefix, dtype=torch.bool, device=device)
        own_waypoints = (row[:, None] == row[None, :]).repeat_interleave(waypoints, dim=1)
        mask = torch.cat((prefix, own_text, own_waypoints), dim=1).repeat_interleave(waypoints, dim=0)
    if not model.config.expert_non_causal:
        order = torch.arange(waypoints, device=device)
        later = (order[None, :] > order[:, None]).repeat(rows, rows)
        mask = (
            torch.ones(rows * waypoints, used + rows * waypoints, dtype=torch.bool, device=device)
            if mask is None
            else mask
        )
        mask[:, used:] &= ~later
    if observe:
        observe("position", positions)
        observe("attend", mask if mask is not None else torch.ones(waypoints, used + waypoints, dtype=torch.bool))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = model.expert(x.flatten(0, 1), t, cos, sin, context.cache, mask, observe).view_as(x)
        if observe:
            observe("x", x)
            observe("t", t)
            observe("v", v)
        return v

    return velocity


def draw_noise(model: Alpamayo, rows: int, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Starting points of the flow, float32 [rows, waypoints, 2]."""
    shape = (rows, model.config.action_space.n_waypoints, 2)
    return torch.randn(shape, device=model.device, generator=generator) * temperature


def act(
    model: Alpamayo,
    velocity: Velocity,
    noise: Tensor,
    initial_speed: Tensor,
    z: float = 0.0,
    steps: int | None = None,
    without_navigation: Velocity | None = None,
    guidance_weight: float | None = None,
) -> tuple[Tensor, Path]:
    """Integrate the flow and turn actions into paths.

    Args:
        model: The network.
        velocity: Of `velocity_field`.
        noise: [rows, waypoints, 2], scaled.
        initial_speed: At t0, m/s; a scalar on the model's device.
        z: Height at t0, metres; waypoints keep it.
        steps: Flow steps; the checkpoint's number by default.
        without_navigation: Velocity of the second context; guidance is off without it.
        guidance_weight: The checkpoint's by default.

    Returns:
        Normalised actions [rows, waypoints, 2], and the paths [rows, waypoints, ...].
    """
    flow = model.config.flow
    if without_navigation is not None:
        weight = flow.inference_guidance_weight if guidance_weight is None else guidance_weight
        velocity = guided(velocity, without_navigation, weight)
    action = integrate(velocity, noise, steps or flow.num_inference_steps)
    return action, model.action_space.to_path(action, initial_speed.expand(action.shape[0]), z)
