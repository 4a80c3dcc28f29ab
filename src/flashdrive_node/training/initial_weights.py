"""Weights to begin training from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.config import AlpamayoConfig

#: Ends of residual branches, made small in deep stacks so that a network begins near the identity.
_BRANCH_ENDS = ("o_proj.weight", "down.weight", "proj.weight", "fc2.weight")
_EMBEDDING_STD = 0.3
#: Highest frequency over the range of the history's bins: neighbours beyond a hundredth of it are told apart.
_BIN_FREQUENCY = 128.0


def new_model(config: AlpamayoConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Alpamayo:
    """An untrained model whose parameters are trained.

    Args:
        config: Its architecture.
        device: Where it is.
        dtype: Of the large weights.
        seed: Draws the weights, on the CPU, so that every device has the same.
    """
    model = Alpamayo.on_meta(config, dtype).to_empty(device=device)
    model.set_constants("release", device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_initial(name, parameter, config, generator))
        # A flow that does not move yet.
        model.expert.action_out_proj.weight.zero_()
        tokens, bins = config.tokens, config.history_tokenizer.num_bins
        rows = slice(tokens.history_token_start, tokens.history_token_start + bins)
        model.language.embed_tokens.weight[rows] = bin_embeddings(bins, config.text.hidden_size, generator).to(
            device, dtype
        )
    return model.requires_grad_(True)


def _initial(name: str, parameter: Tensor, config: AlpamayoConfig, generator: torch.Generator) -> Tensor:
    if parameter.ndim == 1:
        return torch.ones(parameter.shape) if name.endswith("weight") else torch.zeros(parameter.shape)
    values = torch.randn(parameter.shape, generator=generator)
    if "embed_tokens" in name or "pos_embed" in name:
        return values * _EMBEDDING_STD
    values *= parameter.shape[1] ** -0.5
    if "lm_head" in name:
        return values * 0.3
    if name.endswith(_BRANCH_ENDS) and ("blocks." in name or "layers." in name):
        depth = config.vision.depth if "blocks." in name else config.text.num_layers
        values *= (2 * depth) ** -0.5
    return values


def bin_embeddings(bins: int, size: int, generator: torch.Generator) -> Tensor:
    """Embeddings of the ego history's bins as smooth functions of their value: float32 [bins, size].

    A thousand unrelated rows would have to be learnt one by one.
    """
    place = torch.linspace(0, 1, bins)[:, None]
    frequencies = torch.logspace(-1, math.log10(_BIN_FREQUENCY), 24)[None]
    features = torch.cat(((2 * math.pi * place * frequencies).sin(), (2 * math.pi * place * frequencies).cos()), dim=1)
    mix = torch.randn(features.shape[1], size, generator=generator) * features.shape[1] ** -0.5
    return features @ mix * (2**0.5 * _EMBEDDING_STD)


def linear(size: int, out: int) -> nn.Linear:
    """A linear layer of an auxiliary head, which begins at zero."""
    layer = nn.Linear(size, out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
