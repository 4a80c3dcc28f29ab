"""The least time that a window can take on a device: bytes and operations of every stage against measured ceilings.

An operator (the matrices of a stack, its attention, the output head) takes the longer of two times: its bytes at the
rate of a large copy, and its operations at the rate of a large matrix product. A stage is the sum of its operators over
its passes. What counts is what no implementation avoids: weights once per pass, keys and values read and written once,
operations of products and attention (masked pairs not counted). Activations, norms, sampling, moving kept frames and
the action projections are left out; together they are a few per cent at the release's dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from flashdrive_node.engine.drafter_config import DrafterConfig
from flashdrive_node.model.config import AlpamayoConfig, DecoderConfig, VisionConfig
from flashdrive_node.model.precision import FP8, FP8_STATIC, INT4, INT8, W4A8, W4A16, StagePrecision


@dataclass(frozen=True)
class Operator:
    """What one operator moves and computes."""

    #: To and from the device's memory; for an upload over the host's bus.
    bytes: float
    #: Floating-point operations, a multiply-add being two.
    flops: float = 0.0
    upload: bool = False
    #: Stage (of `StagePrecision`) whose format the weight is in, for products with weights that may be quantised.
    stage: str = ""


class FormatCost(NamedTuple):
    """What a format changes of a product."""

    #: Of an element of the weight, with scales.
    bytes: float
    #: How much faster matrix units multiply than in 16 bits, by the makers' figures since Ampere (fp8 since Ada).
    speed: float


_FOUR_BIT_BYTES = 0.5 + 3 / 128
#: By the names of `StagePrecision`; bf16 stands for the type that the model is in.
FORMAT_COSTS = {
    FP8: FormatCost(1, 2),
    FP8_STATIC: FormatCost(1, 2),
    INT8: FormatCost(1, 1),
    INT4: FormatCost(_FOUR_BIT_BYTES, 1),
    W4A16: FormatCost(_FOUR_BIT_BYTES, 1),
    W4A8: FormatCost(_FOUR_BIT_BYTES, 2),
}


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best."""

    #: Of a large matrix product in the model's type.
    flops_per_s: float
    #: Of a large copy within the device's memory, read and written bytes together.
    bytes_per_s: float
    #: From pinned host memory to the device.
    upload_bytes_per_s: float

    def time_s(self, operator: Operator) -> float:
        """Least time of one operator."""
        rate = self.upload_bytes_per_s if operator.upload else self.bytes_per_s
        return max(operator.bytes / rate, operator.flops / self.flops_per_s)


@dataclass(frozen=True)
class Floor:
    """Least time of one stage, and what makes it up."""

    bytes: float
    flops: float
    ms: float

    @classmethod
    def of(cls, operators: Sequence[Operator], ceilings: Ceilings) -> Floor:
        """Of operators that run one behind the other."""
        return cls(
            sum(o.bytes for o in operators),
            sum(o.flops for o in operators),
            1e3 * sum(ceilings.time_s(o) for o in operators),
        )


@dataclass(frozen=True)
class Workload:
    """One window, as far as its cost goes."""

    samples: int
    #: Pixels of the new frames in host memory, bytes.
    frame_bytes: int
    #: Patches of every image that the vision tower runs on.
    patches: tuple[int, ...]
    #: Tokens of the prompt, those of them that are computed, and what these attend to in all.
    prompt_tokens: int
    computed_tokens: int
    prefill_pairs: int
    #: Generated per sample, stop token included.
    tokens: int
    #: Evaluations of the velocity.
    evaluations: int
    #: Speculative rounds; None for one token per pass.
    rounds: int | None = None
    #: Tokens that the drafter guesses among; None for the model's vocabulary, whose head it then reads.
    draft_vocabulary: int | None = None


def stage_operators(
    config: AlpamayoConfig,
    work: Workload,
    item_bytes: int,
    drafter: DrafterConfig | None = None,
    precision: StagePrecision | None = None,
) -> dict[str, list[Operator]]:
    """Operators of every stage of a window, under the engine's names of the stages.

    Args:
        config: Architecture of the model.
        work: The window.
        item_bytes: Of a weight that is not quantised, and of a key's or value's element.
        drafter: Needed for a window with speculative rounds.
        precision: Formats of the weights; by default none is quantised.
    """
    decode = _decode(config, work, item_bytes)
    if work.rounds is not None:
        if drafter is None:
            raise ValueError("a drafter is required for speculative rounds, found none")
        decode = _speculate(config, work, item_bytes, drafter) * work.rounds
    stages = {
        "images": [Operator(work.frame_bytes, upload=True)],
        "encode": vision_pass(config.vision, work.patches, item_bytes),
        "prefill": [*_prefill(config, work, item_bytes), _head(config, 1, item_bytes)],
        "decode": decode,
        "action": _flow_evaluation(config, work, item_bytes) * work.evaluations,
    }
    formats = (precision or StagePrecision()).as_dict()
    return {name: [_in_format(o, formats.get(o.stage), item_bytes) for o in found] for name, found in stages.items()}


def _in_format(operator: Operator, kind: str | None, item_bytes: int) -> Operator:
    cost = FORMAT_COSTS.get(kind or "")
    if cost is None:
        return operator
    return replace(operator, bytes=operator.bytes / item_bytes * cost.bytes, flops=operator.flops / cost.speed)


def stage_floors(
    config: AlpamayoConfig,
    work: Workload,
    item_bytes: int,
    ceilings: Ceilings,
    drafter: DrafterConfig | None = None,
    precision: StagePrecision | None = None,
) -> dict[str, Floor]:
    """Floors of all stages and their sum, "total"; arguments as in `stage_operators`.

    Operations of formats with faster matrix units count as fewer.
    """
    stages = stage_operators(config, work, item_bytes, drafter, precision)
    floors = {name: Floor.of(operators, ceilings) for name, operators in stages.items()}
    return {**floors, "total": Floor.of([o for operators in stages.values() for o in operators], ceilings)}


def decoder_weights(config: DecoderConfig) -> int:
    """Elements of the matrices of a decoder stack."""
    attention = 2 * config.q_size + 2 * config.kv_size
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def decoder_pass(
    config: DecoderConfig, tokens: int, pairs: int, slots: int, item_bytes: int, stage: str = ""
) -> list[Operator]:
    """Tokens through a decoder stack over a cache.

    Args:
        config: The stack.
        tokens: Computed, all rows together.
        pairs: Of a token and a slot that it sees.
        slots: Of the cache that are read or written, each once.
        item_bytes: Of a weight, key or value.
        stage: See `Operator`.
    """
    weights = decoder_weights(config)
    cached = 2 * slots * config.kv_size * config.num_layers
    return [
        Operator(weights * item_bytes, 2.0 * tokens * weights, stage=stage),
        Operator(cached * item_bytes, 4.0 * pairs * config.q_size * config.num_layers),
    ]


def vision_pass(config: VisionConfig, patches: Sequence[int], item_bytes: int) -> list[Operator]:
    """Images of so many patches each through the vision tower, mergers included."""
    rows, hidden = sum(patches), config.hidden_size
    blocks = config.depth * hidden * (4 * hidden + 2 * config.intermediate_size)
    merger = config.merged_size * (config.merged_size + config.out_hidden_size)
    mergers = merger * (1 + len(config.deepstack_layers))
    embed = config.patch_features * hidden
    merged = rows // config.spatial_merge_size**2
    pairs = sum(n * n for n in patches)
    return [
        Operator((blocks + embed) * item_bytes, 2.0 * rows * (blocks + embed), stage="vision"),
        Operator(0, 4.0 * pairs * hidden * config.depth),
        Operator(mergers * item_bytes, 2.0 * merged * mergers, stage="vision"),
    ]


def _prefill(config: AlpamayoConfig, work: Workload, item_bytes: int) -> list[Operator]:
    """All tokens through the stack, but for what the last layer does behind its keys and values: for one of them."""
    text, tokens = config.text, work.computed_tokens
    weights = decoder_weights(text)
    behind = weights // text.num_layers - 2 * text.kv_size * text.hidden_size
    _, attention = decoder_pass(text, tokens, work.prefill_pairs, work.prompt_tokens, item_bytes)
    last = attention.flops / text.num_layers * (1 - 1 / tokens)
    return [
        Operator(weights * item_bytes, 2.0 * (tokens * weights - (tokens - 1) * behind), stage="prefill"),
        replace(attention, flops=attention.flops - last),
    ]


def _head(config: AlpamayoConfig, rows: int, item_bytes: int) -> Operator:
    weights = config.tokens.vocab_size * config.text.hidden_size
    return Operator(weights * item_bytes, 2.0 * rows * weights, stage="lm_head")


def _decode(config: AlpamayoConfig, work: Workload, item_bytes: int) -> list[Operator]:
    """One token of every sample per pass; the stop token runs as well, but needs no logits."""
    n, operators = work.samples, []
    for i in range(1, work.tokens + 1):
        seen, slots = n * (work.prompt_tokens + i), work.prompt_tokens + n * i
        operators += decoder_pass(config.text, n, seen, slots, item_bytes, "decode")
    return operators + [_head(config, n, item_bytes)] * (work.tokens - 1)


def _speculate(config: AlpamayoConfig, work: Workload, item_bytes: int, drafter: DrafterConfig) -> list[Operator]:
    """One round: the drafter guesses, the model checks. Texts count as long as they become."""
    n, block = work.samples, drafter.block_size
    guess = drafter.decoder
    context = drafter.context_length + block
    fc = drafter.context_size * guess.hidden_size
    verified = n * block
    guesses = _head(config, n * (block - 1), item_bytes)
    if work.draft_vocabulary is not None:  # rows of its own, which are not quantised
        rows = work.draft_vocabulary * config.text.hidden_size
        guesses = Operator(rows * item_bytes, 2.0 * n * (block - 1) * rows)
    return [
        Operator(fc * item_bytes, 2.0 * n * drafter.context_length * fc, stage="drafter"),
        *decoder_pass(guess, n * block, n * block * context, 0, item_bytes, "drafter"),
        guesses,
        *decoder_pass(
            config.text,
            verified,
            verified * (work.prompt_tokens + work.tokens),
            work.prompt_tokens + n * work.tokens,
            item_bytes,
            "decode",
        ),
        _head(config, verified, item_bytes),
    ]


def _flow_evaluation(config: AlpamayoConfig, work: Workload, item_bytes: int) -> list[Operator]:
    rows = work.samples * config.action_space.n_waypoints
    seen = work.prompt_tokens + work.tokens + config.action_space.n_waypoints
    slots = work.prompt_tokens + work.samples * work.tokens
    return decoder_pass(config.expert, rows, rows * seen, slots, item_bytes, "expert")


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a device with a large matrix product, a large copy and a large upload; a second or two.

    Args:
        device: A GPU, or the CPU (where an upload is a copy).
        dtype: Of the product.
    """
    on_gpu = device.type == "cuda"
    side, count = (8192, 1 << 30) if on_gpu else (1024, 1 << 26)
    # Random numbers: a product of zeros takes less power and runs faster.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source, target = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.zeros(count // 8, dtype=torch.uint8, pin_memory=on_gpu)
    uploaded = target[: count // 8]
    return Ceilings(
        2.0 * side**3 / _time_s(lambda: torch.mm(a, b, out=product), device),
        2.0 * count / _time_s(lambda: target.copy_(source), device),
        len(host) / _time_s(lambda: uploaded.copy_(host, non_blocking=True), device),
    )


def _time_s(function: Callable[[], object], device: torch.device, calls: int = 10, rounds: int = 3) -> float:
    """Least time per call over a few rounds of calls, behind a round to warm up."""

    def synchronised_s() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def round_s() -> float:
        start_s = synchronised_s()
        for _ in range(calls):
            function()
        return (synchronised_s() - start_s) / calls

    round_s()
    return min(round_s() for _ in range(rounds))
