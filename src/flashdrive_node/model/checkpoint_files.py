"""What the safetensors files of a checkpoint hold, and everything that is wrong with it, from their headers alone."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flashdrive_node.model.safetensors_file import WEIGHT_DTYPES, Entry, Header, read_header
from flashdrive_node.model.state_dict import TensorSlot

#: Tensors that an overlay may replace: the action expert and its projections.
OVERLAY_PREFIXES = ("expert.", "action_in_proj.", "action_out_proj.")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NUMBERED = re.compile(r"(.*?\.)(0|[1-9]\d{0,5})(\..*)", re.DOTALL)
_SHARD_NAME = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors")


@dataclass
class CheckpointFiles:
    """The files of one checkpoint (or overlay), as far as their headers could be read."""

    path: Path
    headers: list[Header] = field(default_factory=list)
    #: Every tensor that was found, by name, with the header of its file.
    tensors: dict[str, tuple[Header, Entry]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    #: Tensors that are absent for a reason that is already among the problems.
    explained: set[str] = field(default_factory=set)
    #: False where a file's contents are unknown, so that nothing can be called missing.
    complete: bool = True

    def add(self, other: CheckpointFiles) -> None:
        """Take further files in, whose tensors have names of their own."""
        self.headers += other.headers
        self.tensors |= other.tensors
        self.problems += other.problems

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(entry.nbytes for _, entry in self.tensors.values())


def survey(path: Path) -> CheckpointFiles:
    """Read the headers of a checkpoint directory, or of one safetensors file. Problems are collected, not raised."""
    files = CheckpointFiles(path)
    shards, index = [path], None
    if path.is_dir():
        shards, index = _shards_of(files)
    listed: dict[str, set[str]] = defaultdict(set)
    for name, shard in (index or {}).items():
        listed[shard].add(name)
    for shard_path in shards:
        if not shard_path.is_file():
            files.explained |= listed[shard_path.name]
            files.complete &= index is not None
            holding = f" ({len(listed[shard_path.name])} tensors)" if index else ""
            files.problems.append(f"{shard_path.name}: required, not found{holding}")
            continue
        _add(files, read_header(shard_path), listed.get(shard_path.name) if index is not None else None)
    return files


def _add(files: CheckpointFiles, header: Header, listed: set[str] | None) -> None:
    """Take one file into the survey; `listed` are the tensors that the index expects in it."""
    files.headers.append(header)
    files.problems += header.problems
    files.explained |= header.broken
    if not header.readable:
        files.explained |= listed or set()
        files.complete &= listed is not None
        return
    for name, entry in header.entries.items():
        if name in files.tensors:
            files.problems.append(f"{name}: in {files.tensors[name][0].path.name} and again in {header.path.name}")
        files.tensors[name] = (header, entry)
    if listed is None:
        return
    held = set(header.entries) | header.broken
    for text, names in (
        ("the index puts it here, the file does not hold it", listed - held),
        ("the file holds it, the index does not put it here", held - listed),
    ):
        files.problems += [f"{header.path.name}: {name}: {text}" for name in collapse(names)]
        files.explained |= names


def _shards_of(files: CheckpointFiles) -> tuple[list[Path], dict[str, str] | None]:
    """Files that make up a directory's checkpoint, and the index (tensor to file name) where it has one."""
    directory = files.path
    present = sorted(directory.glob("*.safetensors"))
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        names = ", ".join(path.name for path in indices)
        files.problems.append(f"one *.safetensors.index.json is required, found {names}")
        files.complete = False
        return [], None
    if indices:
        index = _read_index(indices[0])
        if isinstance(index, str):
            files.problems.append(f"{indices[0].name}: {index}")
            files.complete = False
            return present, None
        shards = [directory / name for name in dict.fromkeys(sorted(index.values()))]
        series = {match[1] for path in shards if (match := _SHARD_NAME.fullmatch(path.name))}
        for path in present:
            match = _SHARD_NAME.fullmatch(path.name)
            if path not in shards and match and match[1] in series:
                files.problems.append(f"{path.name}: a shard that {indices[0].name} does not name")
        return shards, index
    if len(present) == 1 or directory / "model.safetensors" in present:
        return [directory / "model.safetensors" if len(present) > 1 else present[0]], None
    files.complete = False
    if present:
        files.problems.append(f"{len(present)} safetensors files need a *.safetensors.index.json, found none")
    elif pickles := sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES):
        files.problems.append(
            "safetensors files are required, found only pickles, which can run code when they are read: "
            f"{', '.join(pickles)}; convert them with the tools of their publisher"
        )
    else:
        files.problems.append("no *.safetensors file")
    return [], None


def _read_index(path: Path) -> dict[str, str] | str:
    """The index's map from tensor to file name, or what is wrong with it."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"an object with 'weight_map' (tensor to file name) is required: {type(error).__name__}: {error}"
    if bad := sorted({s for s in names.values() if not s.endswith(".safetensors") or Path(s).name != s}):
        return f"names of safetensors files in the same directory are required, found {', '.join(bad[:8])}"
    return names


def check_tensors(files: CheckpointFiles, slots: Iterable[TensorSlot], ignored: Collection[str] = ()) -> list[str]:
    """Compare what the files hold with what the architecture needs.

    Args:
        files: Of the checkpoint.
        slots: What the architecture needs.
        ignored: Tensors that may be there, of any shape and type, and are not read.

    Returns:
        Every missing, unexpected and mis-shaped tensor and every wrong type; tensors that differ only in their layer
        number and have the same problem share a line that names the layers.
    """
    wanted = {slot.name: slot for slot in slots}
    return [*_missing(files, wanted), *_unexpected(files, {*wanted, *ignored}), *_misfits(files, wanted)]


def _missing(files: CheckpointFiles, wanted: dict[str, TensorSlot]) -> list[str]:
    if not files.complete:
        return []
    absent = {name for name, slot in wanted.items() if not slot.optional} - set(files.tensors) - files.explained
    return [f"missing: {name}" for name in collapse(absent)]


def _unexpected(files: CheckpointFiles, wanted: set[str]) -> list[str]:
    return [f"unexpected: {name}" for name in collapse(set(files.tensors) - wanted)]


def _misfits(files: CheckpointFiles, wanted: dict[str, TensorSlot]) -> list[str]:
    """Wrong shapes and types of tensors that are both wanted and there."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name, (_, entry) in files.tensors.items():
        slot = wanted.get(name)
        if slot is None:
            continue
        if entry.shape not in (slot.shape, *slot.other_shapes):
            groups[_shape_problem(slot, entry.shape)].add(name)
        types = slot.types or tuple(WEIGHT_DTYPES)
        if entry.dtype not in types:
            one_of = "one of " if len(types) > 1 else ""
            groups[f"{one_of}{', '.join(types)} is required, found {entry.dtype}"].add(name)
    return [f"{name}: {text}" for text, names in groups.items() for name in collapse(names)]


def _shape_problem(slot: TensorSlot, found: tuple[int, ...]) -> str:
    if slot.name.endswith(("embed_tokens.weight", "lm_head.weight")) and found[1:] == slot.shape[1:]:
        return f"vocabulary: config.json says 'vocab_size' {slot.shape[0]}, the table has {found[0]} rows"
    return f"shape {list(slot.shape)} is required, found {list(found)}"


def check_overlay(files: CheckpointFiles, slots: Iterable[TensorSlot]) -> list[str]:
    """Problems of an overlay: any subset of the expert and its projections, and nothing else."""
    wanted = {slot.name: slot for slot in slots}
    own = {name for name in wanted if name.startswith(OVERLAY_PREFIXES)}
    problems = _unexpected(files, own)
    if problems:
        problems.append(f"only tensors of the model that start with {', '.join(OVERLAY_PREFIXES)} may be replaced")
    if not files.tensors and not files.problems:
        problems.append("holds no tensor")
    return [*problems, *_misfits(files, {name: wanted[name] for name in own})]


def collapse(names: Iterable[str]) -> list[str]:
    """Names in order, those that differ only in their first number as one: ``layers.{0-3,7}.norm.weight``."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    result = []
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            groups[match[1], match[3]].append(int(match[2]))
        else:
            result.append(name)
    for (head, tail), numbers in groups.items():
        result.append(f"{head}{_ranges(sorted(numbers))}{tail}")
    return sorted(result)


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
