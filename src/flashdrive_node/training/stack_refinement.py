"""What is done to all text layers in 4 bits together, once each was fitted alone: rounded in order, scales learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from tqdm import tqdm

from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.paroquant import ParoWeight
from flashdrive_node.training.layer_inputs import InputSettings, LayerInputs
from flashdrive_node.training.quantised_parts import Parts
from flashdrive_node.training.rotation_fit import Fit, FitSettings, output_error
from flashdrive_node.training.scale_tuning import tune_scales
from flashdrive_node.training.stack_error import StackError, stack_error
from flashdrive_node.training.stack_rounding import round_in_order

#: Stages in their order, as reports name them.
ALONE, IN_ORDER, TUNED = STAGES = ("alone", "in_order", "tuned")
#: Part of the state of learning scales.
_TUNING = "scale_tuning"


def refine_together(
    model: Alpamayo,
    met: LayerInputs,
    layers: dict[str, Fit],
    inputs: InputSettings,
    settings: FitSettings,
    parts: Parts,
) -> dict[str, StackError]:
    """Put better layers in the place of those that were fitted alone.

    Args:
        model: The original.
        met: Inputs of these layers and the windows.
        layers: By name, fitted alone; changed in place.
        inputs, settings: How to calibrate.
        parts: Where what is done lies.

    Returns:
        The error of all layers together by stage, those of `STAGES` that were gone through.
    """

    def error() -> StackError:
        return stack_error(model, _weights(layers), met.held_out_windows, settings.int8_inputs)

    errors = {ALONE: error()}
    _round_in_order(model, met, layers, inputs, settings, parts)
    errors[IN_ORDER] = error()
    if settings.tuning_passes:
        weights = tune_scales(
            model,
            _weights(layers),
            met.windows,
            settings,
            parts.read(_TUNING),
            lambda state: parts.write(_TUNING, *state),
        )
        layers.update({n: _refitted(model, met, n, layers[n], weight, settings) for n, weight in weights.items()})
        errors[TUNED] = error()
    return errors


def plain_weight(model: Alpamayo, name: str) -> Tensor:
    """Of a linear layer, [N, K]."""
    return model.get_submodule(name).get_parameter("weight").detach()


def _round_in_order(
    model: Alpamayo,
    met: LayerInputs,
    layers: dict[str, Fit],
    inputs: InputSettings,
    settings: FitSettings,
    parts: Parts,
) -> None:
    """Every layer behind the rounded ones."""
    done = parts.read_all([_in_order(name) for name in layers], Fit.unpacked)
    with tqdm(total=len(layers), initial=len(done), desc="in order", unit="layer") as bar:

        def took(name: str, weight: ParoWeight) -> None:
            done[_in_order(name)] = _refitted(model, met, name, layers[name], weight, settings)
            parts.write(_in_order(name), *done[_in_order(name)].packed())
            bar.update()

        weights = {name: done[_in_order(name)].weight for name in layers if _in_order(name) in done}
        round_in_order(model, _weights(layers), met.windows, inputs.rows, settings, weights, took)
    layers.update({name: done[_in_order(name)] for name in layers})


def _refitted(
    model: Alpamayo, met: LayerInputs, name: str, layer: Fit, weight: ParoWeight, settings: FitSettings
) -> Fit:
    """The layer with another rounding, and the error that it has by itself."""
    held_out = met.rows(name, model.device)[1].float()
    return replace(
        layer, weight=weight, error=output_error(weight, plain_weight(model, name).float(), held_out, settings)
    )


def _weights(layers: Mapping[str, Fit]) -> dict[str, ParoWeight]:
    return {name: layer.weight for name, layer in layers.items()}


def _in_order(name: str) -> str:
    """Of a layer's part."""
    return f"{name}.in_order"
