"""The whole network: vision tower, language model, action expert and action space."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from flashdrive_node.model.action_space import ActionSpace
from flashdrive_node.model.config import AlpamayoConfig
from flashdrive_node.model.expert import ActionExpert, fourier_frequencies
from flashdrive_node.model.language import LanguageModel
from flashdrive_node.model.vision import VisionTower

#: How the normalisation constants and Fourier frequencies are taken: "release" rounds them to bfloat16, as the
#: published code does when it loads a checkpoint, "exact" leaves them as configured.
Constants = Literal["release", "exact"]


class Alpamayo(nn.Module):
    """Alpamayo 1.5 or R1. Build on the meta device, then load a checkpoint into it."""

    def __init__(self, config: AlpamayoConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.language = LanguageModel(config)
        self.expert = ActionExpert(config)
        self.action_space = ActionSpace(config.action_space)

    @classmethod
    def on_meta(cls, config: AlpamayoConfig, dtype: torch.dtype) -> Alpamayo:
        """Modules without storage, of the types that a loaded model has: `dtype`, and float32 where it matters."""
        with torch.device("meta"):
            model = cls(config).to(dtype)
        for part in (model.expert.action_in_proj, model.expert.action_out_proj, model.action_space):
            part.float()
        return model.requires_grad_(False).eval()

    def set_constants(self, constants: Constants, device: torch.device | str) -> None:
        """Fill the constants that a 1.5 checkpoint leaves to the code. Call before loading: R1 files overwrite them."""
        with torch.device(device):
            values = ActionSpace(self.config.action_space).constants
            frequencies = fourier_frequencies(self.config.action_in_proj)
        frequencies = frequencies.expand(self.expert.action_in_proj.frequencies.shape)
        if constants == "release":
            values, frequencies = values.bfloat16().float(), frequencies.bfloat16().float()
        self.action_space.constants = values
        self.expert.action_in_proj.frequencies = frequencies.clone()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations, of the cache, and of weights that are not quantised."""
        return self.language.norm.weight.dtype
