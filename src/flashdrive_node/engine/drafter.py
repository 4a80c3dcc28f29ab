"""The DFlash drafter: guesses the rest of a block of tokens in one pass, from hidden states of the target model.

A few Qwen3 decoder layers without a cache of their own. Context states enter every layer as further keys and values,
unchanged; positions are local (0 is the oldest context state), so a proposal depends on nothing but its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from flashdrive_node.engine.kernels.linear import skinny_linear
from flashdrive_node.engine.slot_pass import next_logits
from flashdrive_node.model.checkpoint import load_weights, materialise
from flashdrive_node.model.config import AlpamayoConfig, DecoderConfig
from flashdrive_node.model.decoder import DecoderLayer, RMSNorm
from flashdrive_node.model.errors import CheckpointError, ConfigError, InputError
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.language import LanguageModel
from flashdrive_node.model.rope import mrope_cos_sin, rotate
from flashdrive_node.model.safetensors_file import TensorSpec, write_file
from flashdrive_node.model.source import read_json
from flashdrive_node.model.state_dict import TensorSlot, decoder_slots

#: The mask token's embedding, which is no row of the target's table: safetensors, or as the release has it.
MASK_FILES = ("mask_embedding.safetensors", "mask_embedding.pt")

#: Ids that alone are guessed, if the file is there: int64 "ids".
VOCABULARY_FILE = "draft_vocabulary.safetensors"


@dataclass(frozen=True)
class DrafterConfig:
    """Architecture of a drafter."""

    decoder: DecoderConfig
    #: Layers of the target whose outputs are the context.
    target_layer_ids: tuple[int, ...]
    #: Tokens of a block: a known one and the guesses.
    block_size: int
    #: States of the last accepted tokens that a proposal looks at.
    context_length: int
    mask_token_id: int

    @property
    def context_size(self) -> int:
        """Width of one context state: the hidden states of all target layers side by side."""
        return len(self.target_layer_ids) * self.decoder.hidden_size


def parse_drafter_config(content: dict[str, Any], target: AlpamayoConfig, where: str) -> DrafterConfig:
    """Read ``config.json`` of a drafter; its own keys stand at the top level or under ``dflash_config``.

    Args:
        content: The file.
        target: Configuration of the model that it drafts for.
        where: Name of the file for error messages.

    Raises:
        ConfigError: Lists every missing key, wrong type, unsupported feature and misfit with the target.
    """
    problems: list[str] = []
    own = {**content, **(content.get("dflash_config") or {})}
    rope = {**content, **(content.get("rope_parameters") or {})}

    def number(source: dict[str, Any], key: str, default: int | None = None) -> int:
        value = source.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"key {key!r} must be a positive int, found {value!r}")
            return 1
        return value

    def real(source: dict[str, Any], key: str) -> float:
        value = source.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            problems.append(f"key {key!r} must be a positive number, found {value!r}")
            return 1.0
        return float(value)

    hidden, heads = number(content, "hidden_size"), number(content, "num_attention_heads")
    head_dim = number(content, "head_dim", max(hidden // heads, 1))
    decoder = DecoderConfig(
        num_layers=number(content, "num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=number(content, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=number(content, "intermediate_size"),
        rms_norm_eps=real(content, "rms_norm_eps"),
        rope_theta=real(rope, "rope_theta"),
        mrope_section=(head_dim // 2, 0, 0),  # one axis: plain rotary positions
    )
    layer_ids = own.get("target_layer_ids")
    if not isinstance(layer_ids, list) or not layer_ids or any(type(i) is not int for i in layer_ids):
        # Files without it exist; the layers that other code falls back to are not those it was trained with.
        problems.append(f"key 'target_layer_ids' must be a list of int, found {layer_ids!r}")
        layer_ids = [0]
    elif outside := [i for i in layer_ids if not 0 <= i < target.text.num_layers]:
        problems.append(f"target_layer_ids must be 0 to {target.text.num_layers - 1}, found {outside}")
    config = DrafterConfig(
        decoder=decoder,
        target_layer_ids=tuple(layer_ids),
        block_size=number(own, "block_size"),
        context_length=number(own, "context_len", 1),
        mask_token_id=number(own, "mask_token_id"),
    )
    if config.block_size < 2:
        problems.append(f"block_size must be at least 2, found {config.block_size}")
    if heads % decoder.num_kv_heads:
        problems.append(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {decoder.num_kv_heads}")
    if hidden != target.text.hidden_size:
        problems.append(f"hidden_size must be the target's, {target.text.hidden_size}, found {hidden}")
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("is_causal", False)):
        if own.get(key, supported) != supported:
            problems.append(f"key {key!r} must be {supported!r}, found {own[key]!r}")
    if odd := sorted(set(content.get("layer_types") or ()) - {"full_attention"}):
        problems.append(f"layer_types must be 'full_attention', found {odd}")
    if problems:
        raise ConfigError(where, problems)
    return config


class Drafter(nn.Module):
    """A block-diffusion drafter. Build on the meta device, then load its weights."""

    mask_embedding: Tensor

    def __init__(self, config: DrafterConfig):
        super().__init__()
        hidden, eps = config.decoder.hidden_size, config.decoder.rms_norm_eps
        self.config = config
        self.fc = nn.Linear(config.context_size, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.layers = nn.ModuleList(DecoderLayer(config.decoder) for _ in range(config.decoder.num_layers))
        self.norm = RMSNorm(hidden, eps)
        self.register_buffer("mask_embedding", torch.empty(hidden))
        # Ids of a reduced vocabulary, and their rows of the target's output head.
        self._reduced: tuple[Tensor, Tensor] | None = None

    def restrict(self, language: LanguageModel, ids: Tensor) -> None:
        """Guess none but some tokens, which spares reading the rest of the head. The target's texts stay the same.

        Args:
            language: The target.
            ids: int64 [n], each once.

        Raises:
            InputError: No ids, ids outside of the target's vocabulary, or one twice.
        """
        rows = len(language.embed_tokens.weight)
        outside = ids.ndim != 1 or not len(ids) or bool((ids < 0).any()) or bool((ids >= rows).any())
        if outside or ids.dtype != torch.int64 or len(ids.unique()) < len(ids):
            raise InputError(
                f"draft vocabulary: different ids of 0 to {rows - 1} are required, found {ids.tolist()[:8]}"
            )
        head, table = cast(nn.Module, language.lm_head), language.embed_tokens.weight
        ids = ids.to(table.device)
        held = head.rows(ids) if isinstance(head, Int8Linear) else language.lm_head.weight[ids]
        self._reduced = ids, held.to(table.dtype).contiguous()

    def forward(self, token: Tensor, context: Tensor) -> Tensor:
        """Hidden states of the guesses for several texts at once.

        Args:
            token: Embedding of each text's known token, [texts, hidden].
            context: States of each text's last accepted tokens, oldest first, [texts, context_length, context_size].

        Returns:
            [texts, block_size - 1, hidden], for the target's output head.
        """
        config, texts = self.config, len(token)
        x = torch.cat((token[:, None], self.mask_embedding.expand(texts, config.block_size - 1, -1)), dim=1)
        states = self.hidden_norm(self.fc(context))
        first = context.shape[1]
        positions = torch.arange(first + config.block_size, device=x.device).expand(3, -1)
        cos, sin = mrope_cos_sin(positions, config.decoder, x.dtype)
        for module in self.layers:
            layer = cast(DecoderLayer, module)
            q, k, v = layer.project(x)
            kv = linear(states, layer.qkv.weight[layer.q_size :]).unflatten(-1, (-1, layer.head_dim))
            context_k, context_v = kv.chunk(2, dim=2)
            k = rotate(torch.cat((layer.k_norm(context_k), k), dim=1), cos, sin)
            v = torch.cat((context_v, v), dim=1)
            q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos[first:], sin[first:]), k, v))
            attended = scaled_dot_product_attention(q, k, v, enable_gqa=layer.group_size > 1)
            x = layer.finish(x, attended.transpose(1, 2).flatten(2))
        return self.norm(x[:, 1:])

    def propose(self, language: LanguageModel, token: Tensor, context: Tensor, forbidden: Tensor | None) -> Tensor:
        """The likeliest guesses.

        Args:
            language: The target, for its embedding table and output head.
            token: The known token of each text, int64 [texts].
            context: See `forward`.
            forbidden: Added to the logits, [vocabulary], -inf for tokens that are never generated.

        Returns:
            int64 [texts, block_size - 1].
        """
        hidden = self(embedding(token, language.embed_tokens.weight), context)
        flat = hidden.flatten(0, 1)
        if self._reduced is None:
            guesses = _likeliest(next_logits(language, flat), forbidden)
        else:
            ids, rows = self._reduced
            guesses = ids[_likeliest(skinny_linear(flat, rows), None if forbidden is None else forbidden[ids])]
        return guesses.unflatten(0, hidden.shape[:2])


def _likeliest(logits: Tensor, forbidden: Tensor | None) -> Tensor:
    return (logits if forbidden is None else logits + forbidden).argmax(dim=-1)


def drafter_slots(config: DrafterConfig) -> list[TensorSlot]:
    """Every tensor of a drafter's files and its place in `Drafter`."""
    hidden = config.decoder.hidden_size
    return [
        TensorSlot("fc.weight", (hidden, config.context_size), "fc.weight"),
        TensorSlot("hidden_norm.weight", (hidden,), "hidden_norm.weight"),
        *decoder_slots("", config.decoder, ""),
    ]


def load_drafter(directory: Path, target: AlpamayoConfig, device: torch.device | str, dtype: torch.dtype) -> Drafter:
    """Load a drafter: ``config.json``, safetensors weights and the embedding of the mask token.

    Raises:
        ConfigError, CheckpointError: The files cannot be used; lists everything that is wrong with each.
    """
    config = parse_drafter_config(read_json(directory / "config.json"), target, str(directory / "config.json"))
    mask = read_mask_embedding(directory, config.decoder.hidden_size)
    with torch.device("meta"):
        drafter = Drafter(config).to(dtype)
    drafter.requires_grad_(False).eval()
    files = directory / "model.safetensors"  # the mask embedding may lie beside it in a file of its own
    load_weights(drafter, drafter_slots(config), files if files.is_file() else directory, device, hash_files=False)
    materialise(drafter, "mask_embedding", torch.empty(0, device=device).device, dtype).copy_(mask)
    return drafter


def read_draft_vocabulary(directory: Path) -> Tensor | None:
    """Ids of a drafter's `VOCABULARY_FILE`, int64 [n], or None where it has none.

    Raises:
        CheckpointError: The file holds something else.
    """
    path = directory / VOCABULARY_FILE
    if not path.is_file():
        return None
    try:
        content = load_file(path)
    except Exception as error:  # parsers fail in many ways on files that are not theirs
        raise CheckpointError(str(path), [f"cannot be read: {error}"]) from error
    if set(content) != {"ids"} or content["ids"].dtype != torch.int64:
        raise CheckpointError(str(path), [f"int64 'ids' alone are required, found {sorted(content)}"])
    return content["ids"]


def read_mask_embedding(directory: Path, size: int) -> Tensor:
    """The mask token's embedding, [size], from the first of `MASK_FILES` that exists.

    A ``.pt`` file goes through PyTorch's weights-only loader, which runs no code of the file.

    Raises:
        CheckpointError: No file, or not one finite vector of this size in it.
    """
    path = next((directory / name for name in MASK_FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(str(directory), [f"one of {', '.join(MASK_FILES)} is required, found neither"])
    try:
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = load_file(path)
    except Exception as error:  # unpicklers and parsers fail in many ways on files that are not theirs
        raise CheckpointError(str(path), [f"cannot be read as tensors alone: {error}"]) from error
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, Tensor) or not content.is_floating_point() or content.numel() != size:
        found = list(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise CheckpointError(str(path), [f"one vector of {size} real numbers is required, found {found}"])
    if not bool(content.isfinite().all()):
        raise CheckpointError(str(path), ["finite numbers are required, found NaN or infinity"])
    return content.flatten()


def convert_mask_embedding(directory: Path, size: int) -> Path:
    """Write ``mask_embedding.safetensors`` beside ``mask_embedding.pt``, which is not needed any more then.

    Raises:
        CheckpointError: See `read_mask_embedding`.
        FileExistsError: The file is there already.
    """
    mask, path = read_mask_embedding(directory, size), directory / MASK_FILES[0]
    dtype = mask.dtype if mask.dtype in (torch.bfloat16, torch.float16) else torch.float32
    write_file(path, [TensorSpec("mask_embedding", (size,), dtype, lambda: mask)])
    return path
