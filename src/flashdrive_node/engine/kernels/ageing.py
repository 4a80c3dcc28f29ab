"""Frames that became older: their values move to another place of the cache, their keys are rotated anew for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdrive_node.engine.kernels.backend import uses_triton
from flashdrive_node.model.rope import rotate


@dataclass(frozen=True, eq=False)
class Moves:
    """Image tokens that go to another place, all at once: places are counted over the image tokens of a window."""

    #: From where, and to where: int64 [M] each.
    source: Tensor
    target: Tensor
    #: The same moves in an order in which none overwrites what another still has to read: int32 [chains, steps] indices
    #: of moves, -1 for none. Chains touch different places.
    chains: Tensor


def age(
    store: Tensor, keys: Tensor, values: Tensor, slots: Tensor, moves: Moves, rotation: tuple[Tensor, Tensor]
) -> None:
    """Carry out moves in a store of keys before rotation, and in the cache behind it.

    Args:
        store: [layers, kv_heads, places, head_dim].
        keys, values: The cache, [layers, kv_heads, slots, head_dim].
        slots: The slot of each place, int64 [image tokens].
        moves: What goes where.
        rotation: Of every move's target, as `rotate` takes it: [M, head_dim] each, in the store's type.
    """
    cos, sin = rotation
    if cos.shape != sin.shape or cos.shape != (len(moves.source), store.shape[3]) or store.shape[1] != keys.shape[1]:
        raise ValueError(
            f"ageing: rotations [{len(moves.source)}, {store.shape[3]}] and a store of the cache's heads are required, "
            f"found {list(cos.shape)}, {list(sin.shape)}, {list(store.shape)} and {list(keys.shape)}"
        )
    if uses_triton(store) and store.is_contiguous() and keys.is_contiguous() and values.is_contiguous():
        from flashdrive_node.engine.kernels.triton_ageing import age as run

        run(store, keys, values, slots, moves, cos, sin)
        return
    age_reference(store, keys, values, slots, moves, cos, sin)


def age_reference(
    store: Tensor, keys: Tensor, values: Tensor, slots: Tensor, moves: Moves, cos: Tensor, sin: Tensor
) -> None:
    """`age` by copies."""
    layers, heads = store.shape[:2]
    moved = store[:, :, moves.source]
    store[:, :, moves.target] = moved
    turned = rotate(moved.permute(2, 0, 1, 3).flatten(1, 2), cos, sin)  # all layers at once
    keys[:, :, slots[moves.target]] = turned.unflatten(1, (layers, heads)).permute(1, 2, 0, 3)
    values[:, :, slots[moves.target]] = values[:, :, slots[moves.source]]


def chained(moves: list[tuple[int, int]], tokens: list[int], offsets: list[int]) -> Moves:
    """Moves of whole images, token by token.

    Args:
        moves: Images, from where to where; those of a camera keep their order.
        tokens: Tokens of each image.
        offsets: Place of each image's first token.
    """
    # Down the row first come first, up the row last come first: then a place is read before it is written to.
    down = sorted((m for m in moves if m[1] < m[0]), key=lambda m: m[1])
    up = sorted((m for m in moves if m[1] > m[0]), key=lambda m: -m[1])
    chains: list[list[tuple[int, int]]] = []
    for move in (*down, *up):
        linked = next((chain for chain in chains if any(set(move) & set(other) for other in chain)), None)
        if linked is None:
            chains.append([move])
        else:
            linked.append(move)
    steps = max((len(chain) for chain in chains), default=0)
    source, target, table, count = [], [], [], 0
    for chain in chains:
        size = tokens[chain[0][0]]
        rows = torch.full((size, steps), -1, dtype=torch.int32)
        for step, (old, new) in enumerate(chain):
            rows[:, step] = torch.arange(count, count + size)
            source.append(torch.arange(size) + offsets[old])
            target.append(torch.arange(size) + offsets[new])
            count += size
        table.append(rows)
    none = torch.zeros(0, dtype=torch.int64)
    return Moves(
        torch.cat(source) if source else none,
        torch.cat(target) if target else none,
        torch.cat(table) if table else torch.zeros(0, 0, dtype=torch.int32),
    )
