"""Work that is spread over processes: everything done once, in order, on the devices that were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from flashdrive_node.evaluation.devices import Progress, spread_each


@dataclass(frozen=True)
class Named:
    """Says what it was given."""

    name: str

    def total(self, indices: Sequence[int]) -> int:
        return len(indices)

    def __call__(self, indices: Sequence[int], device: str, progress: Progress) -> list[tuple[str, int, str, int]]:
        progress(len(indices))
        return [(self.name, index, device, len(indices)) for index in indices]


WORKS = {name: Named(name) for name in ("one", "two")}
EVERYTHING = [(name, index) for name in WORKS for index in range(3, 8)]


def test_each_work_is_done_for_all_scenes_in_order() -> None:
    found = spread_each(WORKS, range(3, 8), ["first", "second", "third", "fourth"], "test")
    assert [row[:2] for row in found] == EVERYTHING
    assert {row[2] for row in found} <= {"first", "second", "third", "fourth"}
    assert {row[3] for row in found} == {2, 3}  # two processes for each work


@pytest.mark.parametrize("scenes", [range(3, 8), range(0)])
def test_one_device_works_in_this_process(scenes: range) -> None:
    found = spread_each(WORKS, scenes, ["only"], "test")
    assert found == [(name, index, "only", len(scenes)) for name in WORKS for index in scenes]
