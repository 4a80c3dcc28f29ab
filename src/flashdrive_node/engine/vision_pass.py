"""A pass of the vision tower: the same sums as `VisionTower.forward`, cut into kernels in another way."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import gelu, scaled_dot_product_attention

from flashdrive_node.engine.kernels.linear import apply
from flashdrive_node.engine.kernels.quantised_linear import Rows
from flashdrive_node.engine.kernels.vision import (
    add_layer_norm_for,
    gelu_mlp,
    layer_norm,
    layer_norm_for,
    rotate_queries_and_keys,
)
from flashdrive_node.model.rope import vision_cos_sin
from flashdrive_node.model.vision import PatchMerger, VisionBlock, VisionFeatures, VisionTower, patch_coordinates

#: Rows and columns of patches.
Grid = tuple[int, int]


class VisionPass:
    """Runs a tower over images; what depends on the grid alone is computed once per grid."""

    def __init__(self, tower: VisionTower):
        self.tower = tower
        self._tables: dict[Grid, tuple[Tensor, Tensor, Tensor]] = {}

    def tables(self, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Position embedding [patches, hidden], cosine and sine [patches, head_dim] of a grid."""
        if grid not in self._tables:
            config, device = self.tower.config, self.tower.pos_embed.weight.device
            row, col = patch_coordinates(grid, config.spatial_merge_size, device)
            self._tables[grid] = (self.tower.position_embedding(grid), *vision_cos_sin(row, col, config))
        return self._tables[grid]

    def run(self, pixels: Tensor, grid: Grid) -> VisionFeatures:
        """Encode images of one grid: patch rows of all of them, [images * patches, patch features]."""
        tower, config = self.tower, self.tower.config
        embedding, cos, sin = self.tables(grid)
        images = len(pixels) // len(embedding)
        x = tower.patch_embed(pixels.to(tower.patch_embed.weight.dtype))
        x = (x.unflatten(0, (images, -1)) + embedding).flatten(0, 1)
        cos, sin = cos.repeat(images, 1), sin.repeat(images, 1)
        blocks = [cast(VisionBlock, block) for block in tower.blocks]
        deepstack: list[Tensor] = []
        hidden = layer_norm_for(blocks[0].qkv, x, blocks[0].norm1)
        for i, (block, following) in enumerate(zip(blocks, [*blocks[1:], None], strict=True)):
            update = self._attend(block, hidden, images, cos, sin)
            x, hidden = add_layer_norm_for(block.fc1, x, update, block.norm2)
            update = gelu_mlp(hidden, block.fc1, block.fc2)
            if following is None:
                x = x + update
            else:
                x, hidden = add_layer_norm_for(following.qkv, x, update, following.norm1)
            if i in config.deepstack_layers:
                merger = tower.deepstack_mergers[config.deepstack_layers.index(i)]
                deepstack.append(_merge(cast(PatchMerger, merger), x))
        return VisionFeatures(_merge(tower.merger, x), deepstack)

    def _attend(self, block: VisionBlock, hidden: Rows, images: int, cos: Tensor, sin: Tensor) -> Tensor:
        parts = rotate_queries_and_keys(apply(block.qkv, hidden), block.heads, cos, sin)
        q, k, v = (part.unflatten(0, (images, -1)).transpose(1, 2) for part in parts)
        attended = scaled_dot_product_attention(q, k, v)  # [images, heads, patches, head_dim]
        return apply(block.proj, attended.transpose(1, 2).reshape(len(cos), -1))


def _merge(merger: PatchMerger, x: Tensor) -> Tensor:
    """`PatchMerger.forward`: [patches, hidden] -> [patches / 4, text hidden]."""
    if merger.norm_after:
        hidden = layer_norm_for(merger.fc1, x.view(-1, merger.merged_size), merger.norm)
    else:
        norm = merger.norm
        normed = layer_norm(x, norm.weight, norm.bias, norm.eps)
        hidden = normed.view(-1, merger.merged_size)
    return apply(merger.fc2, gelu(apply(merger.fc1, hidden)))


def joined(parts: list[VisionFeatures]) -> VisionFeatures:
    """Features of several passes, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    embeds = torch.cat([part.embeds for part in parts])
    return VisionFeatures(embeds, [torch.cat(level) for level in zip(*(part.deepstack for part in parts), strict=True)])


def split(features: VisionFeatures, tokens: list[int]) -> list[VisionFeatures]:
    """Features of single images, of so many tokens each."""
    embeds = features.embeds.split(tokens)
    levels = [level.split(tokens) for level in features.deepstack]
    return [VisionFeatures(part, [level[i] for level in levels]) for i, part in enumerate(embeds)]


def copied(features: VisionFeatures) -> VisionFeatures:
    """The same in tensors of their own."""
    return VisionFeatures(features.embeds.clone(), [level.clone() for level in features.deepstack])
