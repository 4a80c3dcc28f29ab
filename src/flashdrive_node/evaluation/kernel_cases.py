"""What the engine's kernels are asked for in a window, as calls that can be timed beside PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from flashdrive_node.engine.kernels.attention import attend_visible
from flashdrive_node.engine.kernels.elementwise import add_rms_norm, silu_mul
from flashdrive_node.engine.kernels.linear import skinny_linear
from flashdrive_node.engine.kernels.rotary import HeadNorms, norm_rope_write, norm_rope_write_reference
from flashdrive_node.engine.kernels.sampling import draw
from flashdrive_node.engine.kernels.visibility import Visible, block_visibility, up_to, waypoint_visibility
from flashdrive_node.model.attention import attend, group_mask
from flashdrive_node.model.config import AlpamayoConfig, DecoderConfig
from flashdrive_node.model.sampling import SamplingSettings, filter_logits

#: Slots per text behind the prefix.
STRETCH = 24


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one shape: a call per layer, over buffers of its own so that no cache helps."""

    name: str
    #: Read and written by all calls at least.
    bytes: int
    #: As PyTorch does it, and as the engine's kernel does it.
    torch: Sequence[Callable[[], object]]
    own: Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Shapes:
    """Sizes of a window, those of the release by default."""

    prompt: int = 3086
    #: Prompt tokens that a streamed window computes.
    computed: int = 818
    #: Tokens of a text that are checked in one pass.
    block: int = 8
    samples: int = 6


def kernel_cases(
    config: AlpamayoConfig, shapes: Shapes, device: torch.device, dtype: torch.dtype
) -> Iterator[KernelCase]:
    """Every case, its buffers allocated when it is asked for.

    Args:
        config: Gives the sizes of the layers and how many there are.
        shapes: Of the window.
        device: Where the buffers are.
        dtype: Of weights and activations.
    """
    buffers = _Buffers(device, dtype)
    yield from _attention_cases(config, shapes, buffers)
    for tokens in (shapes.block, shapes.computed):
        yield from _elementwise_cases(config.text, tokens, buffers)
    for name, rows, columns, layers in _matrices(config):
        weights = [buffers.draw(rows, columns) for _ in range(layers)]
        x = buffers.draw(shapes.block, columns)
        yield KernelCase(
            f"{name} {rows} x {columns}, {shapes.block} tokens",
            sum(w.nbytes for w in weights),
            [partial(functional.linear, x, w) for w in weights],
            [partial(skinny_linear, x, w) for w in weights],
        )
    yield from _sampling_cases(config, shapes, buffers)


class _Buffers:
    """Random tensors of one type on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        """Normal random numbers."""
        return torch.randn(*shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def integers(self, *values: int) -> Tensor:
        """int64."""
        return torch.tensor(values, device=self.device)


def _attention_cases(config: AlpamayoConfig, shapes: Shapes, buffers: _Buffers) -> Iterator[KernelCase]:
    text, expert, n, device = config.text, config.expert, shapes.samples, buffers.device
    waypoints, prompt = config.action_space.n_waypoints, shapes.prompt
    prefix, used = buffers.integers(prompt), torch.full((n,), 5, device=device)
    slots = prompt + n * (STRETCH + waypoints)
    starts = prompt + torch.arange(n, device=device) * STRETCH
    texts, first = torch.stack((starts, starts + 16), dim=1), buffers.integers(prompt + n * STRETCH)
    computed = torch.linspace(prompt / 4, prompt, shapes.computed, device=device).long()
    seen: list[tuple[str, DecoderConfig, Visible]] = [
        ("one token", text, up_to(buffers.integers(prompt + 5))),
        (f"block of {shapes.block}", text, block_visibility(prefix, used[:1], STRETCH, shapes.block)),
        (f"{n} blocks of {shapes.block}", text, block_visibility(prefix, used, STRETCH, shapes.block)),
        (f"{waypoints} waypoints", expert, waypoint_visibility(prefix, texts[:1], first, waypoints)),
        (f"{n} x {waypoints} waypoints", expert, waypoint_visibility(prefix, texts, first, waypoints)),
        (f"prefill of {shapes.computed}", text, up_to(computed)),
    ]
    layer = (text.num_kv_heads, slots, text.head_dim)
    cache = [(buffers.draw(*layer), buffers.draw(*layer)) for _ in range(text.num_layers)]
    for name, stack, visible in seen:
        q = buffers.draw(len(visible.limits), stack.num_heads, stack.head_dim)
        mask = visible.mask(slots)
        end = int(mask.any(dim=0).nonzero().max()) + 1
        bias = group_mask(mask[:, :end], stack.group_size, q.dtype)
        yield KernelCase(
            f"attention, {name}",
            len(cache) * 2 * stack.kv_size * end * q.element_size(),
            [partial(attend, q, keys[:, :end], values[:, :end], bias) for keys, values in cache],
            [partial(attend_visible, q, keys, values, visible) for keys, values in cache],
        )


def _elementwise_cases(config: DecoderConfig, tokens: int, buffers: _Buffers) -> Iterator[KernelCase]:
    hidden, layers, eps = config.hidden_size, config.num_layers, config.rms_norm_eps
    x, update, weight = buffers.draw(tokens, hidden), buffers.draw(tokens, hidden), buffers.draw(hidden)

    yield KernelCase(
        f"add and norm, {tokens} tokens",
        layers * 4 * x.nbytes,
        [lambda: functional.rms_norm(x + update, weight.shape, weight, eps)] * layers,
        [partial(add_rms_norm, x, update, weight, eps)] * layers,
    )
    gate_up = buffers.draw(tokens, 2 * config.intermediate_size)
    gate, up = gate_up.chunk(2, dim=-1)
    yield KernelCase(
        f"gate, {tokens} tokens",
        layers * gate_up.nbytes * 3 // 2,
        [lambda: functional.silu(gate) * up] * layers,
        [partial(silu_mul, gate_up)] * layers,
    )
    qkv = buffers.draw(tokens, config.q_size + 2 * config.kv_size)
    norms = HeadNorms(buffers.draw(config.head_dim), buffers.draw(config.head_dim), eps)
    cos, sin = buffers.draw(tokens, config.head_dim), buffers.draw(tokens, config.head_dim)
    keys, values = buffers.draw(2, config.num_kv_heads, tokens + 64, config.head_dim).unbind()
    given = (qkv, norms, cos, sin, keys, values, torch.arange(tokens, device=buffers.device) + 7)
    yield KernelCase(
        f"head norms, rotation and cache, {tokens} tokens",
        layers * 2 * qkv.nbytes,
        [partial(norm_rope_write_reference, *given)] * layers,
        [partial(norm_rope_write, *given)] * layers,
    )


def _matrices(config: AlpamayoConfig) -> list[tuple[str, int, int, int]]:
    """Name, rows, columns and number of the language model's matrices."""
    text = config.text
    hidden, n = text.hidden_size, text.num_layers
    return [
        ("q/k/v", text.q_size + 2 * text.kv_size, hidden, n),
        ("attention output", hidden, text.q_size, n),
        ("gate/up", 2 * text.intermediate_size, hidden, n),
        ("down", hidden, text.intermediate_size, n),
        ("output head", config.tokens.vocab_size, hidden, 1),
    ]


def _sampling_cases(config: AlpamayoConfig, shapes: Shapes, buffers: _Buffers) -> Iterator[KernelCase]:
    rule = SamplingSettings()
    for rows in (shapes.block, shapes.block * shapes.samples):
        logits = 3 * buffers.draw(rows, config.tokens.vocab_size)
        noise = torch.empty(logits.shape, device=logits.device).exponential_()
        yield KernelCase(
            f"drawing {rows} tokens",
            logits.nbytes + noise.nbytes,
            [partial(_sort_and_race, logits, rule, noise)],
            [partial(draw, logits, rule, noise)],
        )


def _sort_and_race(logits: Tensor, rule: SamplingSettings, noise: Tensor) -> Tensor:
    return (filter_logits(logits.float(), rule).softmax(dim=-1) / noise).argmax(dim=-1)
