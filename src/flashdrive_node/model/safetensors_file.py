"""The safetensors file format: headers read and checked without the data, and files written tensor by tensor.

A file is a little-endian uint64 N, N bytes of JSON (name to dtype, shape, offsets), and the tensors' bytes without
gaps. Reading the headers ourselves lets one pass over a checkpoint list everything that is wrong with it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Types that weights may have, by their name in a header.
WEIGHT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
#: Types of everything that is read or written: weights, and the integers and 8-bit floats of quantised ones.
DTYPES = WEIGHT_DTYPES | {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2}
_ITEM_BYTES |= {"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}

#: The format's own limit on the header.
_MAX_HEADER_BYTES = 100_000_000

#: What files that are no safetensors often are, by their first bytes.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a PyTorch zip archive (pickle)",
    b"\x80\x02": "a Python pickle",
    b"version https://git-lfs": "a Git LFS pointer, not the data: run 'git lfs pull' in the checkpoint's repository",
    b"GGUF": "a GGUF file",
}


class Entry(NamedTuple):
    """One tensor of one file."""

    #: Name of the type in the header, for example "BF16".
    dtype: str
    shape: tuple[int, ...]
    #: First byte of the tensor in the file, from the file's start.
    start: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass
class Header:
    """What the header of one file says, as far as it could be read."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    #: Everything wrong with the file; each text starts with its name.
    problems: list[str] = field(default_factory=list)
    #: Tensors whose entry could not be used; they are among the problems.
    broken: set[str] = field(default_factory=set)
    #: Whether the list of tensors could be read at all.
    readable: bool = False
    file_bytes: int = 0


def read_header(path: Path) -> Header:
    """Read and check one header. Never raises for what is in the file: see `Header.problems`."""
    header = Header(path)
    try:
        header.file_bytes = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(24)
            length = int.from_bytes(first[:8], "little")
            if len(first) < 8 or length > min(header.file_bytes - 8, _MAX_HEADER_BYTES):
                what = next((what for magic, what in _OTHER_FORMATS.items() if first.startswith(magic)), None)
                header.problems.append(
                    f"{path.name}: not a safetensors file but {what}"
                    if what
                    else f"{path.name}: not a safetensors file, or truncated in its header: the header should be "
                    f"{length} bytes long, the file has {header.file_bytes} bytes"
                )
                return header
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        header.problems.append(f"{path.name}: cannot be read: {error.strerror or error}")
        return header
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        header.problems.append(f"{path.name}: corrupt header: {error}")
        return header
    if not isinstance(content, dict):
        header.problems.append(f"{path.name}: corrupt header: a JSON object is required, found {content!r:.40}")
        return header
    header.readable = True
    metadata = content.pop("__metadata__", {})
    if isinstance(metadata, dict):
        header.metadata = {str(key): str(value) for key, value in metadata.items()}
    for name, fields in content.items():
        entry = _parse_entry(fields, 8 + length)
        if isinstance(entry, str):
            header.broken.add(name)
            header.problems.append(f"{path.name}: corrupt header: tensor {name!r}: {entry}")
        else:
            header.entries[name] = entry
    header.problems += _layout_problems(header, 8 + length)
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"duplicate names among {[key for key, _ in pairs][:4]}")
    return result


def _parse_entry(fields: Any, data_start: int) -> Entry | str:
    """One header entry, or what is wrong with it."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        return f"'dtype', 'shape' and 'data_offsets' are required, found {fields!r:.80}"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        return f"unknown dtype {dtype!r}"
    for values in (shape, offsets):
        if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
            return f"integers >= 0 are required, found shape {shape!r:.80}, data_offsets {offsets!r:.80}"
    if len(offsets) != 2:
        return f"two data_offsets are required, found {offsets!r:.80}"
    required = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != required:
        return f"{dtype} {shape} takes {required} bytes, data_offsets {offsets} span {offsets[1] - offsets[0]}"
    return Entry(dtype, tuple(shape), data_start + offsets[0], required)


def _layout_problems(header: Header, data_start: int) -> list[str]:
    """Overlaps, gaps, and tensors beyond the end of the file."""
    problems, where = [], header.path.name
    end, before = data_start, "the header"
    for name, entry in sorted(header.entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end and not header.problems:
            kind = "overlaps" if entry.start < end else f"leaves {entry.start - end} unused bytes behind"
            problems.append(f"{where}: corrupt header: tensor {name!r} {kind} {before}")
        end, before = max(end, entry.start + entry.nbytes), repr(name)
    if end > header.file_bytes:
        short = [n for n, e in header.entries.items() if e.start + e.nbytes > header.file_bytes]
        problems.append(
            f"{where}: truncated: the header requires {end} bytes, the file has {header.file_bytes}; "
            f"{len(short)} tensor(s) incomplete, first {min(short)!r}"
        )
    elif end < header.file_bytes and not header.problems:
        problems.append(f"{where}: {header.file_bytes - end} bytes behind the last tensor")
    return problems


class TensorSpec(NamedTuple):
    """A tensor to be written; `make` is called when its turn comes, so that a file is never in memory at once."""

    name: str
    shape: tuple[int, ...]
    #: One of `DTYPES`; what `make` gives is cast to it.
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, specs: Iterable[TensorSpec]) -> int:
    """Write one file, holding one tensor at a time, and flush it to the disk.

    Args:
        path: The file; must not exist.
        specs: Its tensors, in the order in which their bytes are written.

    Returns:
        Bytes of tensor data.

    Raises:
        FileExistsError: `path` exists.
        ValueError: A tensor came with another shape than its spec's.
    """
    specs = list(specs)
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        dtype = DTYPE_NAMES[spec.dtype]
        content[spec.name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            tensor = spec.make()
            if tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{spec.name}: shape {list(spec.shape)} is required, found {list(tensor.shape)}")
            tensor = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return offset
