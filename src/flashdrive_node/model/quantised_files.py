"""Quantised layers in a checkpoint's files: which layers they are, in which layout, and what must be there of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashdrive_node.model.checkpoint_files import CheckpointFiles, collapse
from flashdrive_node.model.paro_layouts import (
    FLAT,
    GROUP_SIZE,
    LAYOUTS,
    NAMINGS,
    ROTATION,
    ROUNDS,
    SCRATCH,
    UNPACKED,
    Layout,
    Naming,
    Stored,
    layout_of,
    rotation_tensors,
)
from flashdrive_node.model.state_dict import TensorSlot

#: Key of ``config.json`` under which Hugging Face checkpoints say how they are quantised, and what it must say.
CONFIG_KEY = "quantization_config"
CONFIG_ENTRY = {"quant_method": "paroquant", "bits": 4, "group_size": GROUP_SIZE, "krot": ROUNDS}
_WEIGHT = ".weight"
_OWN = Naming("unpacked.", "unpacked.")
#: Tensors that show that a matrix is packed, by the last part of their names.
_PACKED = (*ROTATION, *dict.fromkeys(name for layout in LAYOUTS for name in layout.tensors(64, GROUP_SIZE)))


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix of the release that a checkpoint holds in 4 bits."""

    #: Of the weight that it stands for; says the matrix's name, shape, module and rows.
    slot: TensorSlot
    layout: Layout
    naming: Naming = FLAT

    @property
    def stem(self) -> str:
        """Name in the files, up to the dot."""
        return self.slot.name.removesuffix(_WEIGHT)

    @property
    def module(self) -> str:
        """Our linear layer that it is, or is some rows of."""
        return self.slot.target.removesuffix(_WEIGHT)

    def unpacked(self) -> StoredMatrix:
        """The same matrix in our own layout, under names that no checkpoint has."""
        return StoredMatrix(self.slot, UNPACKED, _OWN)

    def slots(self) -> dict[str, TensorSlot]:
        """Its tensors in the files, by the last part of their names; targets are below `module`."""
        rows, columns = self.slot.shape
        place = f"{self.module}.row_{self.slot.row}"
        tensors = rotation_tensors(columns) | self.layout.tensors(rows, columns)
        # A single number may be stored with or without a dimension.
        single = ((), (1,))
        return {
            name: TensorSlot(
                f"{self.stem}.{self.naming.of(name)}",
                shape,
                f"{place}.{name}",
                types=(dtype,),
                other_shapes=single if shape in single else (),
            )
            for name, (dtype, shape) in tensors.items()
        }


@dataclass(frozen=True)
class QuantisedFiles:
    """What of a checkpoint is quantised."""

    #: By our linear layer, in the order of its rows.
    matrices: dict[str, list[StoredMatrix]]
    #: Slots of the whole checkpoint, with those of quantised matrices in the place of their weights.
    slots: list[TensorSlot]
    problems: list[str]
    #: Tensors in the files that nobody needs.
    ignored: frozenset[str] = frozenset()

    @property
    def layout(self) -> Layout | None:
        """Of the matrices, which is one where there are no problems; None without any."""
        return next((matrix.layout for group in self.matrices.values() for matrix in group), None)

    def unpacked(self) -> QuantisedFiles:
        """As if the matrices were in our own layout; their present tensors are ignored."""
        matrices = {module: [matrix.unpacked() for matrix in group] for module, group in self.matrices.items()}
        old = {slot.name for group in self.matrices.values() for matrix in group for slot in matrix.slots().values()}
        slots = [slot for slot in self.slots if slot.name not in old]
        slots += [slot for group in matrices.values() for matrix in group for slot in matrix.slots().values()]
        return QuantisedFiles(matrices, slots, self.problems, self.ignored | old)


def find_quantised(files: CheckpointFiles, slots: Sequence[TensorSlot], entry: Any = None) -> QuantisedFiles:
    """Look at the names in a checkpoint's files.

    Args:
        files: Of the checkpoint.
        slots: Of the same architecture without quantisation (`release_slots`).
        entry: What ``config.json`` holds under `CONFIG_KEY`, if anything.
    """
    held = _tensors_behind(files, {s.name.removesuffix(_WEIGHT) for s in slots if len(s.shape) == 2})
    matrices: dict[str, list[StoredMatrix]] = defaultdict(list)
    whole: dict[str, list[str]] = defaultdict(list)
    result: list[TensorSlot] = []
    ignored: set[str] = set()
    for slot in slots:
        stem = slot.name.removesuffix(_WEIGHT)
        matrix = _stored_matrix(slot, held.get(stem, {})) if slot.name.endswith(_WEIGHT) else None
        if matrix is None:
            result.append(slot)
            whole[slot.target.removesuffix(_WEIGHT)].append(slot.name)
            continue
        matrices[matrix.module].append(matrix)
        result += matrix.slots().values()
        ignored |= {f"{stem}.{matrix.naming.of(name)}" for name in SCRATCH} & files.tensors.keys()
    problems = [] if not matrices else _problems(matrices, whole) + _entry_problems(entry)
    return QuantisedFiles(dict(matrices), result, problems, frozenset(ignored))


def _tensors_behind(files: CheckpointFiles, stems: set[str]) -> dict[str, dict[str, Stored]]:
    """The files' tensors by stem, and by what stands behind it."""
    found: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, (_, entry) in files.tensors.items():
        cut = name.rfind(".")
        while cut > 0:
            if name[:cut] in stems:
                found[name[:cut]][name[cut + 1 :]] = Stored(entry.dtype, entry.shape)
            cut = name.rfind(".", 0, cut)
    return found


def _stored_matrix(slot: TensorSlot, held: dict[str, Stored]) -> StoredMatrix | None:
    """What a weight is stored as, from the tensors behind its name; None for a plain weight, or without any."""
    found = {naming: {name: held[naming.of(name)] for name in _PACKED if naming.of(name) in held} for naming in NAMINGS}
    naming = max(found, key=lambda naming: len(found[naming]))
    if not found[naming]:
        return None
    rows, columns = slot.shape
    return StoredMatrix(slot, layout_of(rows, columns, found[naming]), naming)


def _problems(matrices: dict[str, list[StoredMatrix]], whole: dict[str, list[str]]) -> list[str]:
    stored = [matrix for group in matrices.values() for matrix in group]
    layouts = {matrix.layout.name: matrix.stem for matrix in stored}
    problems = []
    if len(layouts) > 1:
        found = "; ".join(f"{stem} is {name}" for name, stem in layouts.items())
        problems.append(f"one layout of 4-bit tensors is required, found {len(layouts)}: {found}")
    odd: dict[tuple[int, int], list[str]] = defaultdict(list)
    for matrix in stored:
        if any(size % multiple for size, multiple in zip(matrix.slot.shape, matrix.layout.multiples, strict=True)):
            odd[matrix.layout.multiples].append(f"{matrix.stem}: {' x '.join(map(str, matrix.slot.shape))}")
    problems += [
        f"{name}, which is no matrix of 4 bits: rows in multiples of {rows} and columns of {columns} are required"
        for (rows, columns), names in odd.items()
        for name in collapse(names)
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
