"""The Qwen3-VL vision tower: patches of single images to language-model embeddings and DeepStack features.

Each image is attended to on its own, so an image's features do not depend on the other images of a window.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, gelu, scaled_dot_product_attention

from flashdrive_node.model.config import VisionConfig
from flashdrive_node.model.decoder import Observe
from flashdrive_node.model.rope import rotate, vision_cos_sin

LAYER_NORM_EPS = 1e-6


class VisionFeatures(NamedTuple):
    """What the language model takes from the images, tokens of all images in order."""

    #: Embeddings that stand at the image positions, [tokens, text hidden].
    embeds: Tensor
    #: Features added to the hidden states at image positions behind text layer 0, 1, 2, ...
    deepstack: list[Tensor]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # made during inference, they must serve training as well
def patch_coordinates(grid: tuple[int, int], merge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, in the order of the patch rows: merge x merge blocks row by row, then inside."""
    rows = torch.arange(grid[0], device=device)[:, None].expand(grid)
    cols = torch.arange(grid[1], device=device)[None, :].expand(grid)

    def blocks(x: Tensor) -> Tensor:
        return x.reshape(grid[0] // merge, merge, grid[1] // merge, merge).transpose(1, 2).reshape(-1)

    return blocks(rows), blocks(cols)


class PatchEmbed(nn.Linear):
    """Patch rows to hidden states.

    On the CPU it runs as the convolution that it is in the reference: a sum of 1536 products is the coarsest rounding
    of the whole network, and in the same order it is the same.
    """

    def __init__(self, config: VisionConfig):
        super().__init__(config.patch_features, config.hidden_size)
        self.kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.channels = config.in_channels

    def forward(self, pixels: Tensor) -> Tensor:
        """[patches, channels x temporal x height x width] -> [patches, hidden]."""
        if pixels.is_cuda:
            return super().forward(pixels)
        shape = (self.channels, *self.kernel)
        out = conv3d(pixels.unflatten(1, shape), self.weight.unflatten(1, shape), self.bias, stride=self.kernel)
        return out.flatten(1)


class PatchMerger(nn.Module):
    """2 x 2 patches to one token. The main merger normalises before concatenating, the DeepStack mergers after."""

    def __init__(self, config: VisionConfig, norm_after: bool):
        super().__init__()
        self.merged_size = config.merged_size
        self.norm_after = norm_after
        self.norm = nn.LayerNorm(config.merged_size if norm_after else config.hidden_size, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(config.merged_size, config.merged_size)
        self.fc2 = nn.Linear(config.merged_size, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[patches, hidden] -> [patches / 4, text hidden]. The GELU here is the exact one."""
        x = self.norm(x.reshape(-1, self.merged_size)) if self.norm_after else self.norm(x).view(-1, self.merged_size)
        return self.fc2(gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """Pre-norm attention inside each image, then an MLP with the tanh form of GELU."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_heads
        self.norm1 = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(hidden, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, hidden)

    def forward(self, x: Tensor, images: int, cos: Tensor, sin: Tensor) -> Tensor:
        """[images * patches, hidden] -> the same; cos and sin are float32 [images * patches, head_dim]."""
        qkv = self.qkv(self.norm1(x)).view(x.shape[0], 3, self.heads, -1)
        q = rotate(qkv[:, 0].float(), cos, sin).to(x.dtype)
        k = rotate(qkv[:, 1].float(), cos, sin).to(x.dtype)
        q, k, v = (t.unflatten(0, (images, -1)).transpose(1, 2) for t in (q, k, qkv[:, 2]))
        attended = scaled_dot_product_attention(q, k, v)  # [images, heads, patches, head_dim]
        x = x + self.proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.fc2(gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class VisionTower(nn.Module):
    """Patch embedding, transformer blocks, and the mergers to the language model's width."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_after=False)
        self.deepstack_mergers = nn.ModuleList(PatchMerger(config, norm_after=True) for _ in config.deepstack_layers)

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Learned table, interpolated bilinearly to a grid of patches: [patches, hidden], in patch-row order."""
        side, device = self.config.position_grid_side, self.pos_embed.weight.device
        rows, cols = patch_coordinates(grid, self.config.spatial_merge_size, device)
        at_row = torch.linspace(0, side - 1, grid[0], device=device)[rows]
        at_col = torch.linspace(0, side - 1, grid[1], device=device)[cols]
        row0, col0 = at_row.int(), at_col.int()
        row1, col1 = (row0 + 1).clamp(max=side - 1), (col0 + 1).clamp(max=side - 1)
        dr, dc = at_row - row0, at_col - col0
        corners = (
            (row0, col0, (1 - dr) * (1 - dc)),
            (row0, col1, (1 - dr) * dc),
            (row1, col0, dr * (1 - dc)),
            (row1, col1, dr * dc),
        )
        weight = self.pos_embed.weight
        parts = [weight[(r * side + c).long()] * share.to(weight.dtype)[:, None] for r, c, share in corners]
        return parts[0] + parts[1] + parts[2] + parts[3]

    def forward(self, pixels: Tensor, grids: list[tuple[int, int]], observe: Observe | None = None) -> VisionFeatures:
        """Encode images.

        Args:
            pixels: Normalised patch rows of all images, [patches, channels * 2 * 16 * 16].
            grids: Patch rows and columns of each image, in order. Neighbours of equal grid run as one batch.
            observe: Receives "patch_embed", "block_in", "block_out.LAST" of the first run of equal grids.

        Returns:
            Features with one token per 2 x 2 patches.
        """
        runs: list[tuple[tuple[int, int], int]] = []
        for grid in grids:
            if runs and runs[-1][0] == grid:
                runs[-1] = (grid, runs[-1][1] + 1)
            else:
                runs.append((grid, 1))
        rows = pixels.split([g[0] * g[1] * n for g, n in runs])
        parts = [
            self.encode_run(part, grid, n, observe if i == 0 else None)
            for i, (part, (grid, n)) in enumerate(zip(rows, runs, strict=True))
        ]
        if len(parts) == 1:
            return parts[0]
        levels = range(len(self.deepstack_mergers))
        return VisionFeatures(
            torch.cat([p.embeds for p in parts]), [torch.cat([p.deepstack[j] for p in parts]) for j in levels]
        )

    def encode_run(self, pixels: Tensor, grid: tuple[int, int], images: int, observe: Observe | None) -> VisionFeatures:
        """Encode images that share one grid; arguments as in `forward`."""
        x = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        if observe:
            observe("patch_embed", x)
        x = (x.unflatten(0, (images, -1)) + self.position_embedding(grid)).flatten(0, 1)
        if observe:
            observe("block_in", x)
        row, col = patch_coordinates(grid, self.config.spatial_merge_size, x.device)
        cos, sin = (t.repeat(images, 1) for t in vision_cos_sin(row, col, self.config))
        deepstack = []
        for i, block in enumerate(self.blocks):
            x = block(x, images, cos, sin)
            if i in self.config.deepstack_layers:
                deepstack.append(self.deepstack_mergers[self.config.deepstack_layers.index(i)](x))
        if observe:
            observe(f"block_out.{len(self.blocks) - 1}", x)
        return VisionFeatures(self.merger(x), deepstack)
