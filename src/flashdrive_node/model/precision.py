"""In which format the weights of each stage are kept and computed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from torch import nn

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.fp8 import Fp8Linear
from flashdrive_node.model.int4_linear import Int4Linear
from flashdrive_node.model.int8 import Int8Linear
from flashdrive_node.model.paroquant import ALWAYS, NEVER
from flashdrive_node.model.quantised_loading import Convert

#: What a stage can be in. "bf16" is the type that the model is loaded in, float32 on a CPU.
BF16, FP8, FP8_STATIC, INT8, INT4, W4A8, W4A16 = "bf16", "fp8", "fp8_static", "int8", "int4", "w4a8", "w4a16"
#: Formats of a stage, the release's own first.
FORMATS = {
    "vision": (BF16, FP8, FP8_STATIC),
    "prefill": (BF16, FP8, FP8_STATIC, W4A8, W4A16),
    "decode": (BF16, FP8, FP8_STATIC, W4A8, W4A16),
    "lm_head": (BF16, INT8, INT4),
    "expert": (BF16, FP8, FP8_STATIC),
    "drafter": (BF16, FP8),
}
#: Linear layers of an `Alpamayo` that a stage's format is of, by what their names begin with; the text layers go by
#: decoding. A drafter is a model of its own.
STAGE_LAYERS = {
    "vision": ("vision.blocks.", "vision.merger.", "vision.deepstack_mergers."),
    "decode": ("language.layers.",),
    "lm_head": ("language.lm_head",),
    "expert": ("expert.layers.",),
}
_DRAFTER_LAYERS = ("fc", "layers.")
_FOUR_BITS = (W4A8, W4A16)
#: Key of ``config.json`` under which a checkpoint says what it was quantised for.
PRECISION_KEY = "stage_precision"
#: Key of ``config.json`` under which it keeps, by linear layer, the largest input that was met, for static scales.
INPUTS_KEY = "largest_inputs"
#: Rows of inputs up to which a pass counts as decoding: a block of drafted tokens for each of six samples.
DECODE_ROWS = 64


@dataclass(frozen=True)
class StagePrecision:
    """A format for every stage. Prefill and decoding use the same weights, so they differ in activations at most."""

    vision: str = BF16
    prefill: str = BF16
    decode: str = BF16
    lm_head: str = BF16
    expert: str = BF16
    drafter: str = BF16

    def __post_init__(self) -> None:
        problems = [
            f"{stage}: one of {', '.join(allowed)} is required, found {getattr(self, stage)!r}"
            for stage, allowed in FORMATS.items()
            if getattr(self, stage) not in allowed
        ]
        if self.prefill != self.decode and (self.prefill, self.decode) != (W4A8, W4A16):
            problems.append(
                "prefill and decode use the same weights: one format, or w4a8 and w4a16, is required, "
                f"found {self.prefill} and {self.decode}"
            )
        if problems:
            raise InputError("precision: " + "; ".join(problems))

    @classmethod
    def parse(cls, value: str | Mapping[str, Any]) -> StagePrecision:
        """From a preset's name, "STAGE=FORMAT,..." or a block of stages; stages that are not named stay bf16.

        Raises:
            InputError: No such preset or stage, or a format that a stage cannot have.
        """
        if isinstance(value, str):
            if value in PRESETS:
                return PRESETS[value]
            value = dict(part.partition("=")[::2] for part in value.split(","))
        if not isinstance(value, Mapping):
            raise InputError(f"precision: a preset or stages are required, found {value!r:.60}")
        unknown = set(value) - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(
                f"precision: one of {', '.join(PRESETS)}, or STAGE=FORMAT,... of the stages {', '.join(FORMATS)} "
                f"is required, found {', '.join(sorted(unknown))!r}"
            )
        return cls(**value)

    def as_dict(self) -> dict[str, str]:
        """By stage, for JSON."""
        return asdict(self)

    @property
    def name(self) -> str:
        """Of the preset, or "STAGE=FORMAT,..."."""
        preset = next((name for name, stages in PRESETS.items() if stages == self), None)
        return preset or ",".join(f"{stage}={kind}" for stage, kind in self.as_dict().items() if kind != BF16)

    @property
    def four_bits(self) -> bool:
        """Whether the text layers' weights have 4 bits, and so must come from a quantised checkpoint."""
        return self.decode in _FOUR_BITS

    @property
    def int8_from(self) -> int:
        """Rows of inputs from which 4-bit layers round them to int8 (`ParoLinear`)."""
        if self.prefill == self.decode:
            return ALWAYS if self.decode == W4A8 else NEVER
        return DECODE_ROWS + 1

    def conversions(
        self, model: nn.Module, stored: frozenset[str] = frozenset(), largest_inputs: Mapping[str, float] | None = None
    ) -> dict[str, Convert]:
        """What becomes of the linear layers of an `Alpamayo` on the meta device, by name, where it is not nothing.

        Args:
            model: The model.
            stored: Linear layers that the checkpoint holds in 4 bits.
            largest_inputs: For layers with a static scale, of a calibration.

        Raises:
            InputError: A layer with a static scale was not calibrated.
        """
        largest = largest_inputs or {}
        result: dict[str, Convert] = {}
        missing: list[str] = []
        for name, module in model.named_modules():
            kind = self.format_of(name)
            if not isinstance(module, nn.Linear) or name in stored:
                continue
            if kind == FP8_STATIC and name not in largest:
                missing.append(name)
            elif kind == FP8_STATIC:
                result[name] = partial(Fp8Linear, largest_input=largest[name])
            elif kind in _ROWWISE:
                result[name] = _ROWWISE[kind]
        if missing:
            raise InputError(
                f"precision: {FP8_STATIC} requires {INPUTS_KEY!r} in config.json, which 'flashdrive quantize' writes; "
                f"found none for {len(missing)} layer(s), first {missing[0]}"
            )
        return result

    def drafter_conversions(self, drafter: nn.Module) -> dict[str, Convert]:
        """The same for the layers of a drafter."""
        return {
            name: _ROWWISE[self.drafter]
            for name, module in drafter.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(_DRAFTER_LAYERS) and self.drafter in _ROWWISE
        }

    def format_of(self, layer: str) -> str:
        """Format of a linear layer's weight, by its name in the model; `W4A8` stands for both of 4 bits."""
        stage = next((stage for stage, prefixes in STAGE_LAYERS.items() if layer.startswith(prefixes)), None)
        found = BF16 if stage is None else getattr(self, stage)
        return W4A8 if found in _FOUR_BITS else found


_ROWWISE: dict[str, Convert] = {FP8: Fp8Linear, INT8: Int8Linear, INT4: Int4Linear}

PRESETS = {
    "bf16": StagePrecision(),
    "fp8": StagePrecision(vision=FP8, prefill=FP8, decode=FP8, lm_head=INT8, expert=FP8, drafter=FP8),
    "w4a8": StagePrecision(vision=FP8, prefill=W4A8, decode=W4A8, lm_head=INT8, expert=FP8, drafter=FP8),
    "w4a16": StagePrecision(vision=FP8, prefill=W4A16, decode=W4A16, lm_head=INT8, expert=FP8, drafter=FP8),
}
