"""Scenes are functions of their keys alone, and splits share none."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashdrive_node.world.draws import SPLITS, Draws, mix, scene_keys
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import select

INDICES = st.integers(0, 2**48 - 1)


def digest(tree: object) -> str:
    """Hash of a dataclass of tensors, numbers rounded to what every CPU agrees on."""
    total = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            array = value.numpy()
            rounded = np.round(array, 6) + 0.0 if array.dtype.kind == "f" else array
            total.update(np.ascontiguousarray(rounded).tobytes())
        else:
            for field in fields(value):  # type: ignore[arg-type]
                add(getattr(value, field.name))

    add(tree)
    return total.hexdigest()[:16]


@given(a=INDICES, b=INDICES, splits=st.permutations(sorted(SPLITS)))
def test_splits_share_no_scene(a: int, b: int, splits: list[str]) -> None:
    first, second = scene_keys(splits[0], [a]), scene_keys(splits[1], [b])
    assert first[0] != second[0]
    # The key is mixed by a bijection, so different keys stay different.
    assert mix(first)[0] != mix(second)[0]


@given(indices=st.lists(INDICES, min_size=2, max_size=20, unique=True))
def test_indices_of_a_split_are_different_scenes(indices: list[int]) -> None:
    keys = scene_keys("train", indices)
    assert len(np.unique(keys)) == len(np.unique(mix(keys))) == len(indices)


@pytest.mark.parametrize(("split", "index"), [("tset", 0), ("train", -1), ("train", 2**48)])
def test_what_is_no_scene_is_refused(split: str, index: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        scene_keys(split, [index])


@given(name=st.text(min_size=1, max_size=12), low=st.floats(-50, 50), width=st.floats(0.1, 50))
def test_draws_stay_in_range_and_repeat(name: str, low: float, width: float) -> None:
    keys = scene_keys("train", range(50))
    values = Draws(keys).uniform(name, low, low + width, 3)
    assert values.shape == (50, 3)
    assert (values >= low).all()
    assert (values <= low + width).all()
    assert np.array_equal(values[10:20], Draws(keys[10:20]).uniform(name, low, low + width, 3))


def test_draws_are_spread_evenly_and_independent_by_name() -> None:
    draws = Draws(scene_keys("train", range(20000)))
    a, b = draws.uniform("a"), draws.uniform("b")
    assert abs(a.mean() - 0.5) < 0.01
    assert np.histogram(a, 10, (0, 1))[0].min() > 1800
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_a_scene_does_not_depend_on_its_batch() -> None:
    keys = scene_keys("test", range(40))
    whole, part = sample_scenes(keys), sample_scenes(keys[12:19])
    assert digest(select(whole, torch.arange(12, 19))) == digest(part)


def test_scenes_are_the_recorded_ones() -> None:
    assert digest(sample_scenes(scene_keys("test", range(64)))) == GOLDEN_SCENES


#: Of the first 64 test scenes. It changes when scenes change: with them every trained model and recorded score.
GOLDEN_SCENES = "940c05968c57006c"
