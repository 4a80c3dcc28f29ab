"""Calibrates a checkpoint for a precision: text layers in 4 bits, one after the other, static scales, the head.

What is done is kept if it is interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from flashdrive_node.evaluation.clip import ClipSource
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.int4 import Int4Weight
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.paro_layouts import GROUP_SIZE
from flashdrive_node.model.paroquant import ParoWeight
from flashdrive_node.model.precision import BF16, FP8_STATIC, INT4, INT8, StagePrecision
from flashdrive_node.model.quantised_writer import save_quantised
from flashdrive_node.training.head_check import HEAD, HeadCheck, check_head
from flashdrive_node.training.layer_inputs import InputSettings, LayerInputs, collect_inputs
from flashdrive_node.training.rotation_fit import Fit, FitSettings, fit

logger = logging.getLogger(__name__)

_TEXT_LAYERS = "language.layers."


@dataclass(frozen=True)
class LayerError:
    """How far a layer's outputs are from the original's, relative, on windows that it was not fitted on."""

    layer: str
    rows: int
    columns: int
    error: float
    #: Before the second stage, which learns the rounding.
    rotated_error: float
    #: Of rounding to the nearest without scales and rotation.
    nearest_error: float


@dataclass(frozen=True)
class QuantisationReport:
    """What was done."""

    checkpoint: str
    sha256: str
    source: str
    stages: dict[str, str]
    inputs: dict[str, Any]
    fit: dict[str, Any]
    layers: list[LayerError]
    #: Text layers that keep their weights because their shape does not fit groups.
    left_out: list[str]
    #: Layers with a static scale for their inputs.
    static: int = 0
    head: HeadCheck | None = None


def quantise_checkpoint(
    loaded: LoadedModel,
    source: ClipSource,
    stages: StagePrecision,
    directory: Path,
    tokenizer_files_dir: Path | None,
    inputs: InputSettings,
    settings: FitSettings,
) -> QuantisationReport:
    """Fit every text layer that is to have 4 bits, measure what else the precision needs, and write the checkpoint.

    Finished layers lie in ``DIRECTORY.parts`` until the checkpoint is written; a second call with the same model and
    settings takes them from there.

    Args:
        loaded: The model, with plain layers.
        source: Windows to calibrate on.
        stages: What it is quantised for; something in it needs a calibration.
        directory: New or empty directory.
        tokenizer_files_dir: Where tokenizer files are copied from.
        inputs, settings: How to calibrate.

    Raises:
        InputError: Nothing that could be quantised, or too few windows.
        CheckpointError: The directory is in use.
    """
    fitting, left_out = quantisable(loaded.model)
    names = fitting if stages.four_bits else []
    static = static_layers(loaded.model, stages)
    wanted = [*names, *static, *([HEAD] if stages.lm_head == INT4 else [])]
    if not wanted or (stages.four_bits and not names):
        raise InputError(
            f"a precision that needs a calibration (4 bits or {FP8_STATIC}) and a model with layers of "
            f"{GROUP_SIZE}-column groups are required, found {stages.name or BF16} and {len(fitting)} such layers"
        )
    identity = {
        "sha256": loaded.info.sha256,
        "source": source.name,
        "inputs": asdict(inputs),
        "fit": asdict(settings),
    }
    parts = _Parts(directory.with_name(f"{directory.name}.parts"), identity)
    fits = {name: done for name in names if (done := parts.read(name)) is not None}
    met = _met(loaded, source, [name for name in wanted if name not in fits], static, inputs)
    fits = _fit_layers(loaded.model, names, fits, parts, met, settings)
    head = check_head(loaded.model, met) if stages.lm_head == INT4 else None
    if head is not None and not head.kept:
        stages = replace(stages, lm_head=INT8)
    layers = {name: done.weight for name, done in fits.items()}
    config = loaded.model.config
    save_quantised(loaded.model, layers, stages, config, directory, tokenizer_files_dir, largest_inputs=met.largest)
    parts.remove()
    errors = [
        LayerError(name, *done.weight.matrix.shape, done.error, done.rotated_error, done.nearest_error)
        for name, done in fits.items()
    ]
    return QuantisationReport(
        checkpoint=str(loaded.info.path),
        sha256=loaded.info.sha256,
        source=source.name,
        stages=stages.as_dict(),
        inputs=asdict(inputs),
        fit=asdict(settings),
        layers=errors,
        left_out=left_out if names else [],
        static=len(static),
        head=head,
    )


def static_layers(model: Alpamayo, stages: StagePrecision) -> list[str]:
    """Names of the linear layers whose inputs get a static scale."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and stages.format_of(name) == FP8_STATIC
    ]


def quantisable(model: Alpamayo) -> tuple[list[str], list[str]]:
    """Names of the text layers that 4 bits take, and of those that they do not."""
    fitting: list[str] = []
    others: list[str] = []
    for name, layer in model.named_modules():
        if name.startswith(_TEXT_LAYERS) and isinstance(layer, nn.Linear):
            fits = layer.in_features % GROUP_SIZE == 0 and all(rows % 8 == 0 for rows in _fused_rows(model, name))
            (fitting if fits else others).append(name)
    return fitting, others


def _fused_rows(model: Alpamayo, name: str) -> Sequence[int]:
    """Rows of the matrices of the release that a text layer is made of."""
    text = model.config.text
    parts = {"qkv": (text.q_size, text.kv_size), "gate_up": (text.intermediate_size,)}
    return parts.get(name.rpartition(".")[2], (text.hidden_size,))


def _met(
    loaded: LoadedModel,
    source: ClipSource,
    left: Sequence[str],
    static: Sequence[str],
    inputs: InputSettings,
) -> LayerInputs:
    """Inputs of the layers that are left to do; nothing is driven where none is."""
    if not left:
        return LayerInputs({}, {})
    return collect_inputs(loaded, source, [name for name in left if name not in static], inputs, static)


def _fit_layers(
    model: Alpamayo,
    names: Sequence[str],
    done: Mapping[str, Fit],
    parts: _Parts,
    met: LayerInputs,
    settings: FitSettings,
) -> dict[str, Fit]:
    """Fits of all layers, in order; `done` are those that were there already."""
    if done:
        logger.info("%d of %d layers are done, from %s", len(done), len(names), parts.directory)
    fits, each = dict(done), max(settings.total_steps, 1)
    with tqdm(total=len(names) * each, initial=len(fits) * each, unit="step", disable=not names) as bar:

        def progress(step: int, error: float) -> None:
            bar.update()
            bar.set_postfix(error=f"{error:.4f}", refresh=False)

        for name in names:
            if name in fits:
                continue
            bar.set_description(name.removeprefix(_TEXT_LAYERS))
            weight = model.get_submodule(name).get_parameter("weight").detach()
            rows = (met.fit[name].to(model.device), met.held_out[name].to(model.device))
            fits[name] = fit(weight, *rows, settings, progress)
            if not settings.total_steps:
                bar.update()
            parts.write(name, fits[name])
    return {name: fits[name] for name in names}


class _Parts:
    """Finished layers on the disk, of one model and one way to calibrate."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]):
        self.directory = directory
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def write(self, name: str, done: Fit) -> None:
        """Keep a layer."""
        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = dict(zip(ParoWeight._fields[:3], done.weight[:3], strict=True))
        tensors |= dict(zip(Int4Weight._fields, done.weight.matrix, strict=True))
        tensors["errors"] = torch.tensor([done.error, done.rotated_error, done.nearest_error], dtype=torch.float64)
        path = self._path(name)
        partial = path.with_suffix(".partial")
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, partial)
        partial.rename(path)

    def read(self, name: str) -> Fit | None:
        """A layer that was kept, or None."""
        path = self._path(name)
        if not path.is_file():
            return None
        tensors: dict[str, Tensor] = load_file(path)
        errors = tensors.pop("errors").tolist()
        matrix = Int4Weight(*(tensors.pop(key) for key in Int4Weight._fields))
        return Fit(ParoWeight(**tensors, matrix=matrix), *errors)

    def remove(self) -> None:
        """All layers are where they belong."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.{self.key[:16]}.safetensors"
