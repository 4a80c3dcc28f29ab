"""Drafters: guess the rest of a block of tokens in one pass, from hidden states of the target model.

A few Qwen3 decoder layers. Context states enter every layer as further keys and values, unchanged: those of the last
tokens, and in a routine drafter those of a prompt's parts, whose keys and values are computed once per prompt. Beyond
that a proposal depends on nothing but its arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, scaled_dot_product_attention

from flashdrive_node.engine.draft_layers import finish_layer, last_outputs, product, project_layer
from flashdrive_node.engine.drafter_config import DrafterConfig, parse_drafter_config
from flashdrive_node.engine.kernels.linear import skinny_linear
from flashdrive_node.engine.mask_embedding import read_mask_embedding
from flashdrive_node.engine.prompt_slots import PromptView
from flashdrive_node.engine.slot_pass import next_logits
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.checkpoint import load_weights, materialise
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.decoder import DecoderLayer, RMSNorm
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.language import LanguageModel
from flashdrive_node.model.linear import RowwiseLinear
from flashdrive_node.model.paroquant import ALWAYS
from flashdrive_node.model.precision import StagePrecision
from flashdrive_node.model.quantised_loading import LayerPlacer
from flashdrive_node.model.rope import mrope_cos_sin, rotate
from flashdrive_node.model.source import read_json
from flashdrive_node.model.state_dict import TensorSlot, decoder_slots

#: Ids that alone are guessed, if the file is there: int64 "ids".
VOCABULARY_FILE = "draft_vocabulary.safetensors"


class PromptMemory(NamedTuple):
    """What a drafter keeps of P prompts with S slots each."""

    #: Rotated, [layers, P, S, kv_heads, head_dim].
    keys: Tensor
    values: Tensor
    #: Added to attention scores, [P, S]: 0 where a slot is seen, else -inf.
    bias: Tensor
    #: Position of the first generated token, int64 [P].
    base: Tensor

    def rows(self, index: Tensor) -> PromptMemory:
        """Of these prompts, int64 [n]."""
        return PromptMemory(self.keys[:, index], self.values[:, index], self.bias[index], self.base[index])


class Drafter(nn.Module):
    """A block-diffusion drafter of either variant. Build on the meta device, then load its weights."""

    mask_embedding: Tensor

    def __init__(self, config: DrafterConfig):
        super().__init__()
        hidden, eps = config.decoder.hidden_size, config.decoder.rms_norm_eps
        self.config = config
        self.fc = nn.Linear(config.context_size, hidden, bias=False)
        self.image_fc = nn.Linear(hidden, hidden, bias=False) if "images" in config.parts else None
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
        held = head.rows(ids) if isinstance(head, RowwiseLinear) else language.lm_head.weight[ids]
        self._reduced = ids, held.to(table.dtype).contiguous()

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that are guessed among; None for the target's whole vocabulary."""
        return None if self._reduced is None else len(self._reduced[0])

    def read(self, view: PromptView) -> PromptMemory:
        """What is kept of P prompts: keys and values of their slots."""
        states = self.fc(view.states)
        if self.image_fc is not None:
            states = torch.cat((self.image_fc(view.cells), states), dim=1)
        states = self.hidden_norm(states)
        prompts, slots = view.kinds.shape
        cos, sin = mrope_cos_sin(view.positions.transpose(0, 1).flatten(1), self.config.decoder, states.dtype)
        rotation = cos.unflatten(0, (prompts, slots)), sin.unflatten(0, (prompts, slots))
        read = [self._keys_values(cast(DecoderLayer, layer), states) for layer in self.layers]
        bias = torch.zeros(view.kinds.shape, dtype=states.dtype, device=states.device)
        return PromptMemory(
            torch.stack([_turn(k, *rotation) for k, _ in read]),
            torch.stack([v for _, v in read]),
            bias.masked_fill_(view.kinds < 0, -torch.inf),
            view.base,
        )

    def forward(
        self,
        token: Tensor,
        context: Tensor,
        prompt: PromptMemory | None = None,
        place: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of the guesses for several texts at once.

        Args:
            token: Embedding of each text's known token, [texts, hidden].
            context: States of each text's last accepted tokens, oldest first, [texts, context_length, context_size].
            prompt: Of `read`, for each text or one for all; a routine drafter with parts needs it.
            place: Tokens in front of the known one in its text, int64 [texts]; rotary positions that are not local
                need it.
            weights: Filled with each layer's attention, float32 [texts, heads, block, slots + context + block].

        Returns:
            [texts, block_size - 1, hidden], for the target's output head.
        """
        config, texts = self.config, len(token)
        x = torch.cat((token[:, None], self.mask_embedding.expand(texts, config.block_size - 1, -1)), dim=1)
        states = self.hidden_norm(product(context, self.fc))
        first = context.shape[1]
        cos, sin = self._rotation(first, prompt, place, x)
        for i, module in enumerate(self.layers):
            layer = cast(DecoderLayer, module)
            q, k, v = project_layer(layer, x)
            context_k, context_v = self._keys_values(layer, states)
            k, v = _turn(torch.cat((context_k, k), dim=1), cos, sin), torch.cat((context_v, v), dim=1)
            bias: Tensor | None = None
            if prompt is not None:
                k, v = (
                    torch.cat((kept[i].expand(texts, -1, -1, -1), own), dim=1)
                    for kept, own in ((prompt.keys, k), (prompt.values, v))
                )
                bias = pad(prompt.bias, (0, first + config.block_size))[:, None, None]
            q = _turn(q, cos[..., first:, :], sin[..., first:, :])
            if weights is not None:
                weights.append(_attention_weights(q, k, bias))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            attended = scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=layer.group_size > 1)
            x = finish_layer(layer, x, attended.transpose(1, 2).flatten(2))
        return self.norm(x[:, 1:])

    def _keys_values(self, layer: DecoderLayer, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of context states [texts, T, hidden], before rotation: [texts, T, kv_heads, head_dim] each."""
        kv = last_outputs(layer.q_size, layer.qkv, states).unflatten(-1, (-1, layer.head_dim))
        k, v = kv.chunk(2, dim=2)
        return layer.k_norm(k), v

    def _rotation(
        self, first: int, prompt: PromptMemory | None, place: Tensor | None, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of context states and block: [T, head_dim] each for all texts, or [texts, T, head_dim]."""
        config = self.config
        steps = torch.arange(first + config.block_size, device=x.device)
        if config.rotary == "local":
            return mrope_cos_sin(steps.expand(3, -1), config.decoder, x.dtype)
        if place is None or prompt is None:
            raise InputError(f"rotary positions {config.rotary!r}: a prompt and places in the texts are required")
        positions = (prompt.base + place - first)[:, None] + steps
        cos, sin = mrope_cos_sin(positions.flatten().expand(3, -1), config.decoder, x.dtype)
        return cos.unflatten(0, positions.shape), sin.unflatten(0, positions.shape)

    def propose(
        self,
        language: LanguageModel,
        token: Tensor,
        context: Tensor,
        forbidden: Tensor | None,
        prompt: PromptMemory | None = None,
        place: Tensor | None = None,
    ) -> Tensor:
        """The likeliest guesses.

        Args:
            language: The target, for its embedding table and output head.
            token: The known token of each text, int64 [texts].
            context: See `forward`, as `prompt` and `place`.
            forbidden: Added to the logits, [vocabulary], -inf for tokens that are never generated.

        Returns:
            int64 [texts, block_size - 1].
        """
        return self._named(self._logits(language, token, context, forbidden, prompt, place).argmax(dim=-1))

    def propose_surely(
        self,
        language: LanguageModel,
        token: Tensor,
        context: Tensor,
        forbidden: Tensor | None,
        prompt: PromptMemory | None = None,
        place: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`propose`, and the probability that the drafter gives each guess, float32 [texts, block_size - 1]."""
        logits = self._logits(language, token, context, forbidden, prompt, place)
        best, index = logits.float().max(dim=-1)
        return self._named(index), (best - logits.float().logsumexp(dim=-1)).exp()

    def _logits(
        self,
        language: LanguageModel,
        token: Tensor,
        context: Tensor,
        forbidden: Tensor | None,
        prompt: PromptMemory | None,
        place: Tensor | None,
    ) -> Tensor:
        """[texts, block_size - 1, vocabulary or what of it is guessed]."""
        hidden = self(embedding(token, language.embed_tokens.weight), context, prompt, place)
        flat = hidden.flatten(0, 1)
        if self._reduced is None:
            logits = next_logits(language, flat)
        else:
            ids, rows = self._reduced
            logits, forbidden = skinny_linear(flat, rows), None if forbidden is None else forbidden[ids]
        return (logits if forbidden is None else logits + forbidden).unflatten(0, hidden.shape[:2])

    def _named(self, index: Tensor) -> Tensor:
        """Token ids of places among what is guessed."""
        return index if self._reduced is None else self._reduced[0][index]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [texts, T, heads, head_dim], by the same angles for all texts [T, head_dim] or each by its own."""
    if cos.ndim == 2:
        return rotate(x, cos, sin)
    return rotate(x.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1)).view_as(x)


def _attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of the scores: q [texts, block, heads, head_dim], k [texts, T, kv_heads, head_dim]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("nqhd,nkhd->nhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias.float()).softmax(dim=-1).detach()


def drafter_slots(config: DrafterConfig) -> list[TensorSlot]:
    """Every tensor of a drafter's files and its place in `Drafter`."""
    hidden = config.decoder.hidden_size
    images = [TensorSlot("image_fc.weight", (hidden, hidden), "image_fc.weight")] if "images" in config.parts else []
    return [
        TensorSlot("fc.weight", (hidden, config.context_size), "fc.weight"),
        *images,
        TensorSlot("hidden_norm.weight", (hidden,), "hidden_norm.weight"),
        *decoder_slots("", config.decoder, ""),
    ]


def load_drafter(
    directory: Path,
    target: AlpamayoConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    precision: StagePrecision | None = None,
) -> Drafter:
    """Load a drafter: ``config.json``, safetensors weights and the embedding of the mask token.

    Args:
        directory: Of the drafter.
        target: Configuration of the model that it drafts for.
        device, dtype: Where the weights go, and their type.
        precision: Its stage ``drafter`` says in which format the layers are kept; None leaves them in `dtype`.

    Raises:
        ConfigError, CheckpointError: The files cannot be used; lists everything that is wrong with each.
    """
    config = parse_drafter_config(read_json(directory / "config.json"), target, str(directory / "config.json"))
    mask = read_mask_embedding(directory, config.decoder.hidden_size)
    with torch.device("meta"):
        drafter = Drafter(config).to(dtype)
    drafter.requires_grad_(False).eval()
    files = directory / "model.safetensors"  # the mask embedding may lie beside it in a file of its own
    slots = drafter_slots(config)
    placer = LayerPlacer(drafter, {}, ALWAYS, (precision or StagePrecision()).drafter_conversions(drafter), device)
    load_weights(
        drafter,
        slots,
        files if files.is_file() else directory,
        device,
        hash_files=False,
        completed=placer.completed,
        take=placer.take,
    )
    materialise(drafter, "mask_embedding", torch.empty(0, device=device).device, dtype).copy_(mask)
    return drafter


def load_drafter_of(directory: Path, model: Alpamayo, precision: StagePrecision | None = None) -> Drafter:
    """`load_drafter` for a loaded target, restricted to its own vocabulary where it has one.

    Raises:
        ConfigError, CheckpointError: See `load_drafter` and `read_draft_vocabulary`.
        InputError: A vocabulary that is not of this target.
    """
    drafter = load_drafter(directory, model.config, model.device, model.dtype, precision)
    if (ids := read_draft_vocabulary(directory)) is not None:
        drafter.restrict(model.language, ids)
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
