"""Random numbers that depend on a scene and a name alone: counter-based integer hashes, no generator state.

Every draw is named, so a new one leaves all others as they were. Everything is sampled on the CPU in integers; devices
get the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Keys = NDArray[np.uint64]

#: Name of a split to the high bits of its scene keys: splits share no scene, whatever the indices.
SPLITS = {"train": 1, "validation": 2, "test": 3}
_INDEX_BITS = 48


def scene_keys(split: str, indices: Sequence[int] | NDArray[np.int64]) -> Keys:
    """Keys of scenes: one per split and index.

    Raises:
        ValueError: Unknown split, or an index outside 0 .. 2^48 - 1.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
    index = np.asarray(indices, dtype=np.int64)
    if index.size and (index.min() < 0 or index.max() >= 1 << _INDEX_BITS):
        raise ValueError(f"scene indices must be in 0 .. 2^48 - 1, found {index.min()} .. {index.max()}")
    return (np.uint64(SPLITS[split] << _INDEX_BITS) + index.astype(np.uint64)).astype(np.uint64)


def mix(value: Keys) -> Keys:
    """Finaliser of splitmix64: a bijection of 64-bit integers that looks random."""
    with np.errstate(over="ignore"):
        z = value + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Draws:
    """Named draws for a batch of scenes."""

    def __init__(self, keys: Keys):
        self.keys = np.asarray(keys, dtype=np.uint64)
        self._mixed = mix(self.keys)

    def bits(self, name: str, *shape: int) -> Keys:
        """64 random bits: [S, *shape]."""
        count = int(np.prod(shape, dtype=np.int64))
        lane = mix(np.arange(count, dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(24)))
        return mix(self._mixed[:, None] ^ lane[None]).reshape(len(self.keys), *shape)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, *shape: int) -> Floats:
        """Numbers in [low, high): [S, *shape]."""
        unit = (self.bits(name, *shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return low + (high - low) * unit

    def chance(self, name: str, probability: float, *shape: int) -> NDArray[np.bool_]:
        """True with a probability: [S, *shape]."""
        return self.uniform(name, 0.0, 1.0, *shape) < probability

    def integer(self, name: str, count: int, *shape: int) -> NDArray[np.int64]:
        """Integers in 0 .. count - 1: [S, *shape]."""
        return np.minimum((self.uniform(name, 0.0, count, *shape)).astype(np.int64), count - 1)

    def sign(self, name: str, *shape: int) -> Floats:
        """-1 or 1: [S, *shape]."""
        return np.where(self.chance(name, 0.5, *shape), 1.0, -1.0)
