"""Layers that have been calibrated, kept on the disk until all of a checkpoint are done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_ERRORS = "errors"
T = TypeVar("T")


class Parts:
    """A folder of finished layers of one model and one way to calibrate."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]):
        """Keep the folder's name, and what its layers depend on."""
        self.directory = directory
        self._key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def write(self, name: str, tensors: Mapping[str, Tensor], errors: Sequence[float]) -> None:
        """Keep a layer, complete or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        kept = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        path = self._path(name)
        partial = path.with_suffix(".partial")
        save_file(kept | {_ERRORS: torch.tensor(errors, dtype=torch.float64)}, partial)
        partial.rename(path)

    def read(self, name: str) -> tuple[dict[str, Tensor], list[float]] | None:
        """Tensors and errors of a layer that was kept, or None."""
        path = self._path(name)
        if not path.is_file():
            return None
        tensors: dict[str, Tensor] = load_file(path)
        errors: list[float] = tensors.pop(_ERRORS).tolist()
        return tensors, errors

    def read_all(self, names: Sequence[str], unpacked: Callable[[dict[str, Tensor], list[float]], T]) -> dict[str, T]:
        """Those of some layers that were kept."""
        found = {name: self.read(name) for name in names}
        return {name: unpacked(*part) for name, part in found.items() if part is not None}

    def remove(self) -> None:
        """All layers are where they belong."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.{self._key[:16]}.safetensors"
