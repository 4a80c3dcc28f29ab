"""What the engine's kernels are asked for in a window, as calls that can be timed beside PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashdrive_node.engine.kernels.attention import attend_visible
from flashdrive_node.engine.kernels.elementwise import add_rms_norm, silu_mul
from flashdrive_node.engine.kernels.linear import gated_linear, skinny_parts
from flashdrive_node.engine.kernels.rotary import HeadNorms, norm_rope_write, norm_rope_write_reference
from flashdrive_node.engine.kernels.sampling import draw
from flashdrive_node.engine.kernels.visibility import Visible, block_visibility, up_to, waypoint_visibility
from flashdrive_node.engine.kernels.waypoints import embed_waypoints, project_velocity
from flashdrive_node.model.attention import attend, group_mask
from flashdrive_node.model.config import AlpamayoConfig, DecoderConfig
from flashdrive_node.model.expert import ActionInProj
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
    buffers = Buffers(device, dtype)
    yield from _attention_cases(config, shapes, buffers)
    for tokens in (shapes.block, shapes.computed):
        yield from _elementwise_cases(config.text, tokens, buffers)
    for matrix in matrices(config, shapes):
        x = buffers.draw(matrix.tokens, matrix.columns)
        weights = [buffers.draw(matrix.rows, matrix.columns) for _ in range(matrix.layers)]
        own, plain = (gated_linear, _gated) if matrix.gated else (skinny_parts, functional.linear)
        yield KernelCase(
            matrix.name,
            sum(w.nbytes for w in weights),
            [partial(plain, x, w) for w in weights],
            [partial(own, x, w) for w in weights],
        )
    yield from _waypoint_cases(config, buffers)
    yield from _sampling_cases(config, shapes, buffers)


@dataclass(frozen=True)
class Matrix:
    """The weight of a product of few rows."""

    title: str
    #: Of the weight, and layers that have one.
    rows: int
    columns: int
    layers: int
    #: Rows of the other operand.
    tokens: int
    #: Whether the first half of an MLP, its activation included.
    gated: bool = False

    @property
    def name(self) -> str:
        """Of the case."""
        return f"{self.title} {self.rows} x {self.columns}, {self.tokens} tokens"


def matrices(config: AlpamayoConfig, shapes: Shapes) -> list[Matrix]:
    """What a block of a text and an evaluation of the flow multiply by."""
    found = []
    for title, stack, tokens in (
        ("", config.text, shapes.block),
        ("expert's ", config.expert, config.action_space.n_waypoints),
    ):
        hidden, n = stack.hidden_size, stack.num_layers
        found += [
            Matrix(f"{title}q/k/v", stack.q_size + 2 * stack.kv_size, hidden, n, tokens),
            Matrix(f"{title}attention output", hidden, stack.q_size, n, tokens),
            Matrix(f"{title}gate/up", 2 * stack.intermediate_size, hidden, n, tokens, gated=True),
            Matrix(f"{title}down", hidden, stack.intermediate_size, n, tokens),
        ]
    return [*found, Matrix("output head", config.tokens.vocab_size, config.text.hidden_size, 1, shapes.block)]


def _gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = functional.linear(x, weight).chunk(2, dim=-1)
    return functional.silu(gate) * up


class Buffers:
    """Random tensors of one type on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        """Normal random numbers."""
        return torch.randn(*shape, generator=self._generator, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, eq=False)
class Seen:
    """Queries of an attention, and what they see."""

    name: str
    stack: DecoderConfig
    visible: Visible


def attentions(config: AlpamayoConfig, shapes: Shapes, device: torch.device) -> list[Seen]:
    """The attentions of a window, in a cache of `cache_slots`."""
    text, expert, n = config.text, config.expert, shapes.samples
    waypoints, prompt = config.action_space.n_waypoints, shapes.prompt
    prefix, used = torch.tensor([prompt], device=device), torch.full((n,), 5, device=device)
    starts = prompt + torch.arange(n, device=device) * STRETCH
    texts, first = torch.stack((starts, starts + 16), dim=1), prefix + n * STRETCH
    computed = torch.linspace(prompt / 4, prompt, shapes.computed, device=device).long()
    behind_text = torch.full((waypoints,), prompt + 16 + waypoints, device=device)
    return [
        Seen("one token", text, up_to(prefix + 5)),
        Seen(f"block of {shapes.block}", text, block_visibility(prefix, used[:1], STRETCH, shapes.block)),
        Seen(f"{n} blocks of {shapes.block}", text, block_visibility(prefix, used, STRETCH, shapes.block)),
        Seen(f"{waypoints} waypoints", expert, up_to(behind_text)),
        Seen(f"{n} x {waypoints} waypoints", expert, waypoint_visibility(prefix, texts, first, waypoints)),
        Seen(f"prefill of {shapes.computed}", text, up_to(computed)),
    ]


def cache_slots(config: AlpamayoConfig, shapes: Shapes) -> int:
    """Slots that prompt, texts and waypoints take."""
    return shapes.prompt + shapes.samples * (STRETCH + config.action_space.n_waypoints)


def _attention_cases(config: AlpamayoConfig, shapes: Shapes, buffers: Buffers) -> Iterator[KernelCase]:
    text, slots = config.text, cache_slots(config, shapes)
    layer = (text.num_kv_heads, slots, text.head_dim)
    cache = [(buffers.draw(*layer), buffers.draw(*layer)) for _ in range(text.num_layers)]
    for seen in attentions(config, shapes, buffers.device):
        stack, visible = seen.stack, seen.visible
        q = buffers.draw(len(visible.limits), stack.num_heads, stack.head_dim)
        mask = visible.mask(slots)
        end = int(mask.any(dim=0).nonzero().max()) + 1
        bias = group_mask(mask[:, :end], stack.group_size, q.dtype)
        yield KernelCase(
            f"attention, {seen.name}",
            len(cache) * 2 * stack.kv_size * end * q.element_size(),
            [partial(attend, q, keys[:, :end], values[:, :end], bias) for keys, values in cache],
            [partial(attend_visible, q, keys, values, visible) for keys, values in cache],
        )


def _elementwise_cases(config: DecoderConfig, tokens: int, buffers: Buffers) -> Iterator[KernelCase]:
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


def _waypoint_cases(config: AlpamayoConfig, buffers: Buffers) -> Iterator[KernelCase]:
    """What stands around one evaluation of the expert."""
    device, dtype, hidden = buffers.device, buffers.dtype, config.expert.hidden_size
    rows = config.action_space.n_waypoints
    way_in = ActionInProj(config.action_in_proj, 2, hidden).to(device).requires_grad_(False)
    way_out = nn.Linear(hidden, 2, device=device).requires_grad_(False)
    for norm in way_in.norms:
        nn.init.ones_(cast(Tensor, norm.weight))
    x, state = buffers.draw(rows, 2).float(), buffers.draw(rows, hidden)
    part = way_in.time_part(torch.full((1,), 0.5, device=device))
    yield KernelCase(
        f"projection in, {rows} waypoints",
        sum(p.nbytes for p in way_in.parameters()),
        [lambda: way_in.embed(x, part).to(dtype)],
        [partial(embed_waypoints, x, part, way_in, dtype)],
    )
    yield KernelCase(
        f"projection out, {rows} waypoints",
        state.nbytes + way_out.weight.nbytes,
        [lambda: functional.linear(state.float(), way_out.weight, way_out.bias)],
        [partial(project_velocity, state, way_out)],
    )


def _sampling_cases(config: AlpamayoConfig, shapes: Shapes, buffers: Buffers) -> Iterator[KernelCase]:
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
