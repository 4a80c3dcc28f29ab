"""Calibrates a checkpoint for a precision: layers in 4 and in 8 bits, one after the other, static scales, the head.

What is done is kept if it is interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from flashdrive_node.evaluation.clip import ClipSource
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.paro_layouts import GROUP_SIZE
from flashdrive_node.model.precision import BF16, FP8, FP8_STATIC, INT4, INT8, W4A8, StagePrecision
from flashdrive_node.model.quantised_writer import save_quantised
from flashdrive_node.training.float_rounding import FloatFit, fit_float
from flashdrive_node.training.head_check import HEAD, HeadCheck, check_head
from flashdrive_node.training.layer_inputs import InputSettings, LayerInputs, collect_inputs
from flashdrive_node.training.quantised_parts import Parts
from flashdrive_node.training.rotation_fit import NEAREST, Fit, FitSettings, fit
from flashdrive_node.training.stack_error import StackError
from flashdrive_node.training.stack_refinement import plain_weight, refine_together

logger = logging.getLogger(__name__)

_TEXT_LAYERS = "language.layers."
#: Told the step and its relative error.
Progress = Callable[[int, float], None]


class _Packed(Protocol):
    """A layer that can be kept."""

    def packed(self) -> tuple[dict[str, Tensor], list[float]]: ...


T = TypeVar("T", bound=_Packed)


@dataclass(frozen=True)
class LayerError:
    """How far a layer's outputs are from the original's, relative, on windows that it was not fitted on."""

    layer: str
    #: "w4a8" (which stands for both of 4 bits) or "fp8".
    format: str
    rows: int
    columns: int
    error: float
    #: Of rounding to the nearest without scales and rotation.
    nearest_error: float
    #: In 4 bits, before the second stage, which learns the rounding.
    rotated_error: float | None = None


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
    #: All text layers in 4 bits together by stage: as they were fitted alone, rounded in order, with scales learned.
    together: dict[str, StackError] = field(default_factory=dict)


def quantise_checkpoint(
    loaded: LoadedModel,
    source: ClipSource,
    stages: StagePrecision,
    directory: Path,
    tokenizer_files_dir: Path | None,
    inputs: InputSettings,
    settings: FitSettings,
) -> QuantisationReport:
    """Fit every layer that is to have 4 or 8 bits, measure what else the precision needs, and write the checkpoint.

    Finished layers lie in ``DIRECTORY.parts`` until the checkpoint is written; a second call with the same model and
    settings takes them from there.

    Args:
        loaded: The model, with plain layers.
        source: Windows to calibrate on.
        stages: What it is quantised for; something in it needs a calibration.
        directory: New or empty directory.
        tokenizer_files_dir: Where tokenizer files are copied from.
        inputs, settings: How to calibrate. Where rounding is to the nearest, layers in 8 bits need none.

    Raises:
        InputError: Nothing that could be quantised, or too few windows.
        CheckpointError: The directory is in use.
    """
    model = loaded.model
    fitting, left_out = quantisable(model)
    names = fitting if stages.four_bits else []
    floats = [] if settings.method == NEAREST else layers_in(model, stages, FP8, FP8_STATIC)
    static = layers_in(model, stages, FP8_STATIC)
    wanted = [*names, *floats, *static, *([HEAD] if stages.lm_head == INT4 else [])]
    if not wanted or (stages.four_bits and not names):
        raise InputError(
            f"a precision that needs a calibration (4 bits, {FP8} that is not rounded to the nearest, or {FP8_STATIC}) "
            f"and a model with layers of {GROUP_SIZE}-column groups are required, found {stages.name or BF16} and "
            f"{len(fitting)} such layers"
        )
    identity = {
        "sha256": loaded.info.sha256,
        "source": source.name,
        "inputs": asdict(inputs),
        "fit": asdict(settings),
    }
    parts = Parts(directory.with_name(f"{directory.name}.parts"), identity)
    small, eight = parts.read_all(names, Fit.unpacked), parts.read_all(floats, FloatFit.unpacked)
    # Static layers' inputs are measured in any case, whether their weights are done or not.
    in_order = bool(names) and settings.rounds_in_order
    # What is rounded in order needs the windows and every layer's inputs, whatever is done.
    kept = {*eight} if in_order else {*small, *eight}
    left = [name for name in dict.fromkeys(wanted) if name not in kept and (name in floats or name not in static)]
    met = collect_inputs(loaded, source, left, inputs, static, in_order) if left or static else LayerInputs({}, {})

    def fit_rotated(name: str, progress: Progress) -> Fit:
        return fit(plain_weight(model, name), *met.rows(name, model.device), settings, progress)

    def fit_rounded(name: str, progress: Progress) -> FloatFit:
        done = fit_float(plain_weight(model, name), *met.rows(name, model.device))
        progress(0, done.error)
        return replace(done, weight=done.weight.bfloat16().cpu())

    _fit_layers("4 bits", names, small, max(settings.total_steps, 1), fit_rotated, parts)
    together = refine_together(model, met, small, inputs, settings, parts) if in_order else {}
    _fit_layers("8 bits", floats, eight, 1, fit_rounded, parts)
    head = check_head(model, met) if stages.lm_head == INT4 else None
    if head is not None and not head.kept:
        stages = replace(stages, lm_head=INT8)
    save_quantised(
        model,
        {name: small[name].weight for name in names},
        stages,
        model.config,
        directory,
        tokenizer_files_dir,
        largest_inputs=met.largest,
        rounded={name: eight[name].weight for name in floats},
    )
    parts.remove()
    return QuantisationReport(
        checkpoint=str(loaded.info.path),
        sha256=loaded.info.sha256,
        source=source.name,
        stages=stages.as_dict(),
        inputs=asdict(inputs),
        fit=asdict(settings),
        layers=[*(_error_of(name, small[name]) for name in names), *(_error_of(name, eight[name]) for name in floats)],
        left_out=left_out if names else [],
        static=len(static),
        head=head,
        together=together,
    )


def layers_in(model: Alpamayo, stages: StagePrecision, *formats: str) -> list[str]:
    """Names of the linear layers that are to be in one of some formats."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and stages.format_of(name) in formats
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


def _error_of(name: str, done: Fit | FloatFit) -> LayerError:
    if isinstance(done, FloatFit):
        rows, columns = done.weight.shape
        return LayerError(name, FP8, rows, columns, done.error, done.nearest_error)
    rows, columns = done.weight.matrix.shape
    return LayerError(name, W4A8, rows, columns, done.error, done.nearest_error, done.rotated_error)


def _fit_layers(
    title: str,
    names: Sequence[str],
    done: dict[str, T],
    steps: int,
    fit_one: Callable[[str, Progress], T],
    parts: Parts,
) -> None:
    """Fit the layers that are not done, in order, and keep each.

    Args:
        title: Of the progress bar.
        names: Of all layers.
        done: Takes the others; those in it were there already.
        steps: Of one layer.
        fit_one: Fits a layer, and reports its steps and errors.
        parts: Where they are kept.
    """
    if done:
        logger.info("%s: %d of %d layers are done, from %s", title, len(done), len(names), parts.directory)
    with tqdm(total=len(names) * steps, initial=len(done) * steps, unit="step", disable=not names) as bar:
        for name in names:
            if name in done:
                continue
            bar.set_description(f"{title} {name}")
            behind = bar.n + steps

            def progress(step: int, error: float) -> None:
                bar.update()
                bar.set_postfix(error=f"{error:.4f}", refresh=False)

            done[name] = fit_one(name, progress)
            bar.update(behind - bar.n)
            parts.write(name, *done[name].packed())
