"""Whether 4-bit layers are of the model that they are said to be of: one of them against the plain weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from flashdrive_node.model.checkpoint_files import CheckpointFiles, survey
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.paroquant import ParoLinear
from flashdrive_node.model.quantised_files import QuantisedFiles, StoredMatrix

#: Largest relative error of a matrix that counts as its own rounding: 4 bits in groups of 128 cost about a tenth,
#: fine-tuning adds little, and matrices that have nothing to do with each other are 1.4 apart.
MAX_ERROR = 0.5


@dataclass(frozen=True)
class BaseComparison:
    """One matrix beside the base's."""

    matrix: str
    layout: str
    #: Norm of the difference relative to the base's.
    relative_error: float


def compare_with_base(files: CheckpointFiles, quantised: QuantisedFiles, base: Path) -> BaseComparison:
    """Dequantise the first packed matrix of a checkpoint, turn its rotation back, and compare.

    Args:
        files: Of the quantised checkpoint, without problems.
        quantised: What of it is quantised.
        base: Directory of the plain checkpoint that it was made from.

    Raises:
        CheckpointError: Nothing to compare, or the matrices have nothing to do with each other.
    """
    matrix = next((matrix for group in quantised.matrices.values() for matrix in group), None)
    if matrix is None:
        raise CheckpointError(str(files.path), ["layers in 4 bits are required to compare with a base, found none"])
    plain = _read(survey(base), matrix.slot.name)
    if tuple(plain.shape) != matrix.slot.shape:
        raise CheckpointError(
            str(base),
            [f"{matrix.slot.name}: shape {list(matrix.slot.shape)} is required, found {list(plain.shape)}"],
        )
    found = dequantised_matrix(files, matrix)
    plain = plain.float()
    error = float((found - plain).norm() / plain.norm())
    if not error <= MAX_ERROR:
        raise CheckpointError(
            str(files.path),
            [
                f"{matrix.stem}: a matrix within {MAX_ERROR:.0%} of the one in {base} is required, found one that is "
                f"{error:.0%} away: the checkpoint was quantised from another model, or is not in layout "
                f"{matrix.layout.name}"
            ],
        )
    return BaseComparison(matrix.stem, matrix.layout.name, error)


def dequantised_matrix(files: CheckpointFiles, matrix: StoredMatrix) -> Tensor:
    """One packed matrix of a checkpoint as its product is, float32 [N, K].

    Raises:
        CheckpointError: Tensors that make up no layer.
    """
    tensors = {name: _read(files, slot.name) for name, slot in matrix.slots().items()}
    try:
        return ParoLinear(matrix.layout.read(tensors)).dequantised()
    except InputError as error:
        raise CheckpointError(matrix.stem, [str(error)]) from error


def _read(files: CheckpointFiles, name: str) -> Tensor:
    """One tensor."""
    if name not in files.tensors:
        raise CheckpointError(str(files.path), [*files.problems, f"{name} is required, found none"])
    with safe_open(files.tensors[name][0].path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
