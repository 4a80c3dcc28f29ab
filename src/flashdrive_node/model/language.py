"""The language model: prompt tokens with image features to a cache and next-token logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.decoder import DecoderLayer, Observe, RMSNorm, run_layers
from flashdrive_node.model.kv_cache import KVCache
from flashdrive_node.model.rope import mrope_cos_sin
from flashdrive_node.model.vision import VisionFeatures


class LanguageModel(nn.Module):
    """Qwen3 text stack with DeepStack inputs and an untied output head."""

    def __init__(self, config: AlpamayoConfig):
        super().__init__()
        self.config = config.text
        self.embed_tokens = nn.Embedding(config.tokens.vocab_size, config.text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config.text) for _ in range(config.text.num_layers))
        self.norm = RMSNorm(config.text.hidden_size, config.text.rms_norm_eps)
        self.lm_head = nn.Linear(config.text.hidden_size, config.tokens.vocab_size, bias=False)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        mask: Tensor | None = None,
        features: VisionFeatures | None = None,
        image_index: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Append tokens to a context.

        Args:
            ids: Token ids [T].
            positions: Positions on the three axes [3, T].
            cache: The context so far; the tokens take its next T slots.
            mask: True where a token may look, [T, used + T]. None: a prompt on an empty cache is causal, and a single
                token sees everything. Several tokens on a context need a mask.
            features: Image features for the tokens at `image_index`.
            image_index: Indices of the image tokens among the T, int64 [image tokens].
            observe: See `run_layers`.

        Returns:
            Hidden states behind the final norm, [T, hidden].
        """
        start, tokens = cache.used, ids.shape[0]
        if mask is None and start > 0 and tokens > 1:
            raise ValueError(f"{tokens} tokens on a context of {start} need a mask")
        cache.require(start + tokens)
        x = embedding(ids, self.embed_tokens.weight)
        if features is not None and image_index is not None:
            x = x.index_copy(0, image_index, features.embeds)

        def deepstack(layer: int, hidden: Tensor) -> Tensor:
            if features is None or image_index is None or layer >= len(features.deepstack):
                return hidden
            return hidden.index_add_(0, image_index, features.deepstack[layer])

        cos, sin = mrope_cos_sin(positions, self.config, x.dtype)
        causal = mask is None and tokens > 1
        x = run_layers(self.layers, x, cos, sin, cache, start, mask, causal, deepstack, observe)
        cache.used = start + tokens
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in float32: [T, hidden] -> [T, vocabulary]."""
        return self.lm_head(hidden).float()


def causal_mask(start: int, tokens: int, device: torch.device) -> Tensor:
    """Mask of `tokens` new tokens on a context of `start`: bool [tokens, start + tokens], True where allowed."""
    columns = torch.arange(start + tokens, device=device)
    rows = torch.arange(start, start + tokens, device=device)
    return columns[None, :] <= rows[:, None]
