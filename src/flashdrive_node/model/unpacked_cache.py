"""Packed matrices of a foreign layout, un-repacked once and kept as a safetensors file in the user's cache directory.

For models on the CPU, where it takes 0.08 s of a core for every 4096 x 4096 weights; on a GPU matrices are unpacked as
they are read. The file's name is a hash of the packed tensors' contents, so that a checkpoint that changes, or lies
elsewhere, finds what is its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from flashdrive_node.model.checkpoint_files import CheckpointFiles, survey
from flashdrive_node.model.paro_layouts import write_unpacked
from flashdrive_node.model.quantised_files import QuantisedFiles, StoredMatrix
from flashdrive_node.model.safetensors_file import DTYPES, TensorSpec, write_file

logger = logging.getLogger(__name__)

#: Names the directory, and the format of what is in it.
_FOLDER = Path("flashdrive_node") / "unpacked-1"
_READ_BYTES = 16 << 20


def cache_directory() -> Path:
    """``XDG_CACHE_HOME`` or ``~/.cache``, and our part of it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _FOLDER


def unpacked_file(files: CheckpointFiles, quantised: QuantisedFiles, cache: Path | None = None) -> Path | None:
    """The file with a checkpoint's matrices in our own layout, written now if it is not there.

    Args:
        files: Of the checkpoint, without problems.
        quantised: What of it is quantised.
        cache: Directory for such files; None for `cache_directory`.

    Returns:
        The file, or None where it cannot be written.
    """
    cache = cache_directory() if cache is None else cache
    path = cache / f"{content_hash(files, quantised)}.safetensors"
    if path.is_file() and not survey(path).problems:
        return path
    partial_path = path.with_suffix(f".partial-{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        written = write_file(partial_path, _specs(files, quantised))
        partial_path.replace(path)
    except OSError as error:
        logger.warning("unpacked matrices cannot be kept in %s: %s", cache, error)
        return None
    finally:
        with suppress(OSError):
            partial_path.unlink(missing_ok=True)
    logger.info("unpacked matrices of %s are kept in %s (%.2f GiB)", files.path, path, written / 2**30)
    return path


def content_hash(files: CheckpointFiles, quantised: QuantisedFiles) -> str:
    """SHA-256 over names, types, shapes and bytes of all packed tensors, in the order of the model."""
    digest = hashlib.sha256()
    for matrix in _matrices(quantised):
        for slot in matrix.slots().values():
            header, entry = files.tensors[slot.name]
            digest.update(f"{slot.name} {entry.dtype} {entry.shape}\n".encode())
            with header.path.open("rb") as file:
                file.seek(entry.start)
                for first in range(0, entry.nbytes, _READ_BYTES):
                    digest.update(file.read(min(_READ_BYTES, entry.nbytes - first)))
    return digest.hexdigest()


def _matrices(quantised: QuantisedFiles) -> list[StoredMatrix]:
    return [matrix for group in quantised.matrices.values() for matrix in group]


def _specs(files: CheckpointFiles, quantised: QuantisedFiles) -> list[TensorSpec]:
    """The tensors to be written, one matrix in memory at a time."""
    matrices = _matrices(quantised)
    bar = tqdm(total=len(matrices), desc="unpacking", unit="matrix")

    @lru_cache(maxsize=1)
    def unpacked(number: int) -> dict[str, Tensor]:
        matrix = matrices[number]
        tensors = {name: _read(files, slot.name) for name, slot in matrix.slots().items()}
        bar.update()
        if number == len(matrices) - 1:
            bar.close()
        return write_unpacked(matrix.layout.read(tensors))

    def tensor(number: int, name: str) -> Tensor:
        return unpacked(number)[name]

    return [
        TensorSpec(slot.name, slot.shape, DTYPES[slot.types[0]], partial(tensor, number, name))
        for number, matrix in enumerate(matrices)
        for name, slot in matrix.unpacked().slots().items()
    ]


def _read(files: CheckpointFiles, name: str) -> Tensor:
    with safe_open(files.tensors[name][0].path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
