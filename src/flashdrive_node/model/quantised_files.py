"""Quantised layers in a checkpoint's files: which layers they are, in which layout, and what must be there of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashdrive_node.model.checkpoint_files import CheckpointFiles, collapse
from flashdrive_node.model.paro_layouts import GROUP_SIZE, LAYOUTS, ROUNDS, Layout
from flashdrive_node.model.state_dict import TensorSlot

#: Key of ``config.json`` under which Hugging Face checkpoints say how they are quantised, and what it must say.
CONFIG_KEY = "quantization_config"
CONFIG_ENTRY = {"quant_method": "paroquant", "bits": 4, "group_size": GROUP_SIZE, "krot": ROUNDS}
_WEIGHT = ".weight"


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of the release that a checkpoint holds in 4 bits."""

    #: Of the weight that it stands for; says the matrix's name, shape, module and rows.
    slot: TensorSlot
    layout: Layout

    @property
    def stem(self) -> str:
        """Name in the files, up to the dot."""
        return self.slot.name.removesuffix(_WEIGHT)

    @property
    def module(self) -> str:
        """Our linear layer that it is, or is some rows of."""
        return self.slot.target.removesuffix(_WEIGHT)

    def slots(self) -> dict[str, TensorSlot]:
        """Its tensors in the files, by their names behind the stem; targets are below `module`."""
        rows, columns = self.slot.shape
        place = f"{self.module}.row_{self.slot.row}"
        return {
            name: TensorSlot(f"{self.stem}.{name}", shape, f"{place}.{name.replace('.', '_')}", types=(dtype,))
            for name, (dtype, shape) in self.layout.tensors(rows, columns).items()
        }


@dataclass(frozen=True)
class QuantisedFiles:
    """What of a checkpoint is quantised."""

    #: By our linear layer, in the order of its rows.
    matrices: dict[str, list[StoredMatrix]]
    #: Slots of the whole checkpoint, with those of quantised matrices in the place of their weights.
    slots: list[TensorSlot]
    problems: list[str]


def find_quantised(files: CheckpointFiles, slots: Sequence[TensorSlot], entry: Any = None) -> QuantisedFiles:
    """Look at the names in a checkpoint's files.

    Args:
        files: Of the checkpoint.
        slots: Of the same architecture without quantisation (`release_slots`).
        entry: What ``config.json`` holds under `CONFIG_KEY`, if anything.
    """
    held = _suffixes(files, {s.name.removesuffix(_WEIGHT) for s in slots if len(s.shape) == 2})
    matrices: dict[str, list[StoredMatrix]] = defaultdict(list)
    whole: dict[str, list[str]] = defaultdict(list)
    result: list[TensorSlot] = []
    for slot in slots:
        layout = _layout_of(held.get(slot.name.removesuffix(_WEIGHT), set())) if slot.name.endswith(_WEIGHT) else None
        if layout is None:
            result.append(slot)
            whole[slot.target.removesuffix(_WEIGHT)].append(slot.name)
            continue
        matrix = StoredMatrix(slot, layout)
        matrices[matrix.module].append(matrix)
        result += matrix.slots().values()
    problems = [] if not matrices else _problems(matrices, whole) + _entry_problems(entry)
    return QuantisedFiles(dict(matrices), result, problems)


def _suffixes(files: CheckpointFiles, stems: set[str]) -> dict[str, set[str]]:
    """What stands behind the stems in the names of the files' tensors."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in files.tensors:
        cut = name.rfind(".")
        while cut > 0:
            if name[:cut] in stems:
                found[name[:cut]].add(name[cut + 1 :])
            cut = name.rfind(".", 0, cut)
    return found


def _layout_of(suffixes: set[str]) -> Layout | None:
    """The layout of a matrix with these tensors; None where it is a plain weight, or missing as a whole."""
    return next((layout for layout in LAYOUTS if suffixes & set(layout.tensors(8, GROUP_SIZE))), None)


def _problems(matrices: dict[str, list[StoredMatrix]], whole: dict[str, list[str]]) -> list[str]:
    stored = [matrix for group in matrices.values() for matrix in group]
    layouts = {matrix.layout.name: matrix.stem for matrix in stored}
    problems = []
    if len(layouts) > 1:
        found = "; ".join(f"{stem} is {name}" for name, stem in layouts.items())
        problems.append(f"one layout of 4-bit tensors is required, found {len(layouts)}: {found}")
    odd = [m.stem for m in stored if m.slot.shape[0] % 8 or m.slot.shape[1] % GROUP_SIZE]
    problems += [
        f"{name}: rows in eights and columns in groups of {GROUP_SIZE} are required of a 4-bit matrix"
        for name in collapse(odd)
    ]
    mixed = [name for module in matrices for name in whole.get(module, [])]
    return problems + [
        f"{name}: 4 bits are required, as of the other matrices on the same input, found a plain weight"
        for name in collapse(mixed)
    ]


def _entry_problems(entry: Any) -> list[str]:
    if entry is None:
        return []
    if not isinstance(entry, dict):
        return [f"config.json: key {CONFIG_KEY!r}: an object is required, found {entry!r:.40}"]
    return [
        f"config.json: {CONFIG_KEY}.{key} must be {value!r}, found {entry.get(key)!r}"
        for key, value in CONFIG_ENTRY.items()
        if entry.get(key, value) != value
    ]
