"""The mask token's embedding, which is no row of the target's table: safetensors, or as the release has it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashdrive_node.model.errors import CheckpointError
from flashdrive_node.model.safetensors_file import TensorSpec, write_file

#: Files that may hold it, the first that exists is read.
MASK_FILES = ("mask_embedding.safetensors", "mask_embedding.pt")


def read_mask_embedding(directory: Path, size: int) -> Tensor:
    """The mask token's embedding, [size], from the first of `MASK_FILES` that exists.

    A ``.pt`` file goes through PyTorch's weights-only loader, which runs no code of the file.

    Raises:
        CheckpointError: No file, or not one finite vector of this size in it.
    """
    path = next((directory / name for name in MASK_FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(str(directory), [f"one of {', '.join(MASK_FILES)} is required, found neither"])
    try:
        if path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = load_file(path)
    except Exception as error:  # unpicklers and parsers fail in many ways on files that are not theirs
        raise CheckpointError(str(path), [f"cannot be read as tensors alone: {error}"]) from error
    if isinstance(content, dict) and len(content) == 1:
        content = next(iter(content.values()))
    if not isinstance(content, Tensor) or not content.is_floating_point() or content.numel() != size:
        found = list(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise CheckpointError(str(path), [f"one vector of {size} real numbers is required, found {found}"])
    if not bool(content.isfinite().all()):
        raise CheckpointError(str(path), ["finite numbers are required, found NaN or infinity"])
    return content.flatten()


def convert_mask_embedding(directory: Path, size: int) -> Path:
    """Write ``mask_embedding.safetensors`` beside ``mask_embedding.pt``, which is not needed any more then.

    Raises:
        CheckpointError: See `read_mask_embedding`.
        FileExistsError: The file is there already.
    """
    mask, path = read_mask_embedding(directory, size), directory / MASK_FILES[0]
    dtype = mask.dtype if mask.dtype in (torch.bfloat16, torch.float16) else torch.float32
    write_file(path, [TensorSpec("mask_embedding", (size,), dtype, lambda: mask)])
    return path
