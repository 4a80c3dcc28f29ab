"""Every parameter of the node: one table, which the node, params/flashdrive.yaml and the README are held to.

The table is the dataclass ``Parameters`` itself; the metadata of a field carries range, unit and meaning. Nothing here
needs ROS, so that the documentation can be made without it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

#: Fixed when the process starts; refused afterwards.
AT_START = "at start"
#: Takes effect with the next ``configure``; refused while the node is configured.
AT_CONFIGURE = "at configure"
#: May be set at any time and acts on the next window.
ANY_TIME = "any time"

FAKE_FAULTS = ("none", "slow", "raise", "hang", "out_of_memory", "nan", "short", "jump")


class ParameterError(ValueError):
    """Parameters that cannot be used; lists every one of them."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


@dataclass(frozen=True)
class ParameterSpec:
    """What one parameter may be."""

    #: ROS name, for example "fake.latency_s".
    name: str
    default: bool | int | float | str
    description: str
    changes: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def range_text(self) -> str:
        """The accepted values in words: "0.05 to 10.0 s", "plain or fake", or the type."""
        if self.choices:
            return ", ".join(self.choices[:-1]) + f" or {self.choices[-1]}"
        if self.minimum is not None:
            return f"{_number(self.minimum)} to {_number(self.maximum)} {self.unit}".rstrip()
        return {bool: "true or false", str: "text"}[type(self.default)]  # every number has a range

    def accept(self, value: Any) -> bool | int | float | str:
        """The value in the parameter's type; whole numbers are taken for decimal ones.

        Raises:
            ValueError: Wrong type, not finite, out of range, or none of the choices; says what was required and found.
        """
        kind = type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        good = type(value) is kind
        if good and kind is float:
            good = math.isfinite(value)
        if good and self.minimum is not None and self.maximum is not None:
            good = self.minimum <= value <= self.maximum
        if good and self.choices:
            good = value in self.choices
        if not good:
            raise ValueError(
                f"parameter '{self.name}' must be {self.range_text} ({kind.__name__}), "
                f"found {value!r} ({type(value).__name__})"
            )
        return value


def _number(value: float | None) -> str:
    return f"{value:g}"


def _parameter(
    default: Any,
    description: str,
    changes: str = AT_CONFIGURE,
    span: tuple[float, float] | None = None,
    unit: str = "",
    choices: tuple[str, ...] = (),
    name: str = "",
) -> Any:
    low, high = span or (None, None)
    metadata = {
        "name": name,
        "description": description,
        "changes": changes,
        "unit": unit,
        "minimum": low,
        "maximum": high,
        "choices": choices,
    }
    return field(default=default, metadata=metadata)


#: The value of a stage's parameter that leaves its format to the preset.
AS_PRESET = "preset"
#: Names of the parameters that set one stage's format.
_STAGES = "stages."
_TEXT_FORMATS = ("bf16", "fp8", "fp8_static", "w4a8", "w4a16")


def _stage(stage: str, what: str, *formats: str) -> Any:
    description = f"Format of {what}; preset takes what 'precision' says"
    return _parameter(AS_PRESET, description, choices=(AS_PRESET, *formats), name=f"{_STAGES}{stage}")


@dataclass(frozen=True)
class Parameters:
    """The values of all parameters, checked. The order here is the order of the documentation."""

    # Engine
    engine: str = _parameter(
        "plain",
        "What computes: the model window by window, the model over a stream of windows, or a stand-in without one",
        choices=("plain", "streaming", "fake"),
    )
    checkpoint: str = _parameter("", "Directory of a checkpoint, or a Hugging Face id; the fake engine needs none")
    revision: str = _parameter("", "Revision of the Hugging Face id; empty takes the cached default")
    allow_download: bool = _parameter(False, "Fetch a checkpoint that is not in the local cache")
    overlay: str = _parameter(
        "", "File or directory of a fine-tuned expert to put over the checkpoint's; empty for none"
    )
    device: str = _parameter("auto", "PyTorch device: auto (GPU where there is one), cpu, cuda or cuda:N")
    precision: str = _parameter(
        "auto",
        "Arithmetic of the networks; auto goes by the card and by its memory; see docs/precision.md",
        choices=("auto", "bfloat16", "float32", "fp8", "w4a8", "w4a16"),
    )
    vision_format: str = _stage("vision", "the vision tower", "bf16", "fp8", "fp8_static")
    prefill_format: str = _stage("prefill", "the text layers, reading the prompt", *_TEXT_FORMATS)
    decode_format: str = _stage("decode", "the text layers, writing", *_TEXT_FORMATS)
    lm_head_format: str = _stage("lm_head", "the output head", "bf16", "int8", "int4")
    expert_format: str = _stage("expert", "the action expert", "bf16", "fp8", "fp8_static")
    drafter_format: str = _stage("drafter", "the drafter", "bf16", "fp8")
    num_samples: int = _parameter(1, "Trajectories drawn per window", span=(1, 64))
    temperature: float = _parameter(0.6, "Sampling temperature of the reasoning; 0 is greedy", span=(0.0, 2.0))
    top_p: float = _parameter(0.98, "Nucleus of the sampling", span=(0.01, 1.0))
    top_k: int = _parameter(0, "Candidates per token; 0 leaves them unlimited, 1 is greedy", span=(0, 1000))
    max_generation_length: int = _parameter(256, "Longest reasoning", span=(1, 1024), unit="tokens")
    flow_steps: int = _parameter(10, "Integration steps of the trajectory", span=(1, 100))
    guidance_weight: float = _parameter(
        1.0, "Weight of the navigation text in classifier-free guidance; 1 is off", span=(0.0, 10.0)
    )
    noise_temperature: float = _parameter(
        1.0, "Scale of the noise that trajectories start from; less is less diverse", span=(0.0, 2.0)
    )
    seed: int = _parameter(0, "Seed of the sampling", span=(0, 2**31 - 1))
    hang_timeout_s: float = _parameter(
        10.0, "A window that computes longer is reported as hanging", span=(0.1, 600.0), unit="s"
    )
    # Streaming engine
    stream_mode: str = _parameter(
        "features",
        "Keep nothing, the images' features (exact), or keys and values too (approximate, least work)",
        choices=("full", "features", "kv"),
    )
    refresh_every: int = _parameter(
        0, "In mode kv, compute all images anew every so many windows; 0 is never", span=(0, 100000)
    )
    refresh_views: bool = _parameter(False, "In mode kv, compute one camera's images anew in every window, in turn")
    drafter: str = _parameter("", "Directory of a drafter that guesses the text; empty for none")
    draft_confidence: float = _parameter(
        0.0,
        "Check only as many guesses as the drafter is this sure of; 0 checks whole blocks",
        span=(0.0, 0.999),
    )
    flow_schedule: str = _parameter(
        "", "Flow steps to evaluate, such as 8:0,1,2,7 or 8:0,1,2,7:linear; empty evaluates all flow_steps"
    )
    shared_text: bool = _parameter(False, "One reasoning for all samples in place of one each")
    ingest: bool = _parameter(
        False, "Compute each camera's frame as it comes, so that an answer waits for the last camera alone"
    )
    # Inputs
    rig: str = _parameter("sample", "Camera rig: name of a file in params/rigs, or a path to one", AT_START)
    frame_interval_s: float = _parameter(0.1, "Time between the four frames of a camera", span=(0.02, 1.0), unit="s")
    frame_tolerance_s: float = _parameter(
        0.05, "Largest distance of a frame from the time that it stands for", span=(0.001, 0.5), unit="s"
    )
    min_period_s: float = _parameter(0.1, "Shortest time between two windows", span=(0.0, 10.0), unit="s")
    max_odometry_gap_s: float = _parameter(
        0.25, "Longest hole in the odometry that is interpolated", span=(0.01, 2.0), unit="s"
    )
    max_extrapolation_s: float = _parameter(
        0.0, "How far t0 may be ahead of the newest odometry; 0 waits for it", span=(0.0, 0.05), unit="s"
    )
    navigation_timeout_s: float = _parameter(
        10.0, "A navigation text that is older is dropped; 0 keeps it", ANY_TIME, span=(0.0, 3600.0), unit="s"
    )
    navigation_max_length: int = _parameter(
        200, "Longest accepted navigation text", ANY_TIME, span=(1, 2000), unit="characters"
    )
    # Outputs
    output_frame: str = _parameter(
        "base", "Frame of the outputs: the vehicle at t0, or the odometry's frame", choices=("base", "odom", "map")
    )
    max_result_age_s: float = _parameter(
        2.0, "A result whose t0 is older when it is ready is withheld", ANY_TIME, span=(0.05, 60.0), unit="s"
    )
    require_complete_reasoning: bool = _parameter(True, "Withhold results whose reasoning was cut", ANY_TIME)
    max_acceleration: float = _parameter(
        9.8, "Trajectories beyond it, in either direction, are withheld", ANY_TIME, span=(0.1, 20.0), unit="m/s²"
    )
    max_curvature: float = _parameter(
        0.33, "Trajectories beyond it, to either side, are withheld", ANY_TIME, span=(0.01, 2.0), unit="1/m"
    )
    publish_markers: bool = _parameter(True, "Publish ~/debug/markers", ANY_TIME)
    vehicle_width: float = _parameter(
        0.0, "Width of the drawn path; 0 takes the rig's", ANY_TIME, span=(0.0, 5.0), unit="m"
    )
    # Node
    auto_activate: bool = _parameter(False, "Configure and activate without being asked", AT_START)
    diagnostics_period_s: float = _parameter(
        1.0, "Time between two diagnostics; a change is published at once", AT_START, span=(0.1, 10.0), unit="s"
    )
    # Fake engine
    fake_latency_s: float = _parameter(
        0.1, "Time that the fake engine takes per window", ANY_TIME, span=(0.0, 60.0), unit="s", name="fake.latency_s"
    )
    fake_load_s: float = _parameter(
        0.0, "Time that the fake engine takes to load", span=(0.0, 600.0), unit="s", name="fake.load_s"
    )
    fake_probe: str = _parameter(
        "",
        "Function (package.module:function) that turns an observation into metrics of the record",
        AT_START,
        name="fake.probe",
    )
    fake_fault: str = _parameter(
        "none", "Fault that the fake engine shows from now on", ANY_TIME, choices=FAKE_FAULTS, name="fake.fault"
    )


def _spec(entry: Field[Any]) -> ParameterSpec:
    if entry.default is MISSING:
        raise TypeError(f"parameter {entry.name} has no default")
    details = dict(entry.metadata)
    return ParameterSpec(details.pop("name") or entry.name, entry.default, **details)


#: Headings of the YAML by the first parameter under them.
_HEADINGS = {
    "engine": "Engine",
    "stream_mode": "Streaming engine (engine: streaming)",
    "rig": "Inputs",
    "output_frame": "Outputs and what is withheld",
    "auto_activate": "Node",
    "fake.latency_s": "Fake engine (engine: fake)",
}

#: By ROS name, in the order of the documentation.
SPECS: dict[str, ParameterSpec] = {spec.name: spec for spec in map(_spec, fields(Parameters))}
_FIELDS = dict(zip(SPECS, (entry.name for entry in fields(Parameters)), strict=True))


def parameters_from(values: Mapping[str, Any]) -> Parameters:
    """Check values by ROS name and build ``Parameters``; what is absent takes its default.

    Raises:
        ParameterError: Unknown names, wrong types, values out of range, or values that do not go together; all at once.
    """
    problems: list[str] = []
    accepted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in SPECS:
            problems.append(f"parameter '{name}' is unknown")
            continue
        try:
            accepted[_FIELDS[name]] = SPECS[name].accept(value)
        except ValueError as error:
            problems.append(str(error))
    parameters = Parameters(**accepted)
    if not problems:
        problems = _contradictions(parameters)
    if problems:
        raise ParameterError(problems)
    return parameters


def chosen_stages(parameters: Parameters) -> dict[str, str]:
    """Formats of the stages that do not go by the preset."""
    stages = {name.removeprefix(_STAGES): _FIELDS[name] for name in SPECS if name.startswith(_STAGES)}
    values = {stage: getattr(parameters, entry) for stage, entry in stages.items()}
    return {stage: value for stage, value in values.items() if value != AS_PRESET}


def _contradictions(parameters: Parameters) -> list[str]:
    """Values that are good one by one and make no sense together."""
    problems = []
    if parameters.frame_tolerance_s * 2 > parameters.frame_interval_s:
        problems.append(
            f"parameter 'frame_tolerance_s' must be at most half of 'frame_interval_s' "
            f"({parameters.frame_interval_s:g} s), found {parameters.frame_tolerance_s:g} s"
        )
    if parameters.ingest and parameters.engine != "streaming":
        problems.append(
            f"parameter 'ingest' must be false with engine '{parameters.engine}', which takes whole windows; found true"
        )
    if parameters.precision in ("auto", "float32") and (stages := chosen_stages(parameters)):
        problems.append(
            f"parameter 'precision' must be bfloat16 or a preset where '{_STAGES}{min(stages)}' is set, "
            f"found {parameters.precision!r}"
        )
    device = parameters.device.removeprefix("cuda:")
    if parameters.device not in ("auto", "cpu", "cuda") and not (device != parameters.device and device.isdecimal()):
        problems.append(f"parameter 'device' must be auto, cpu, cuda or cuda:N, found {parameters.device!r}")
    return problems


def _literal(value: bool | int | float | str) -> str:
    """A default as YAML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def parameters_markdown() -> str:
    """The table of the README."""
    lines = ["| parameter | default | accepted | may change | meaning |", "|---|---|---|---|---|"]
    lines += [
        f"| `{spec.name}` | `{_literal(spec.default)}` | {spec.range_text} | {spec.changes} | {spec.description} |"
        for spec in SPECS.values()
    ]
    return "\n".join(lines) + "\n"


def parameters_yaml() -> str:
    """The text of params/flashdrive.yaml: every parameter with its default, its range and its meaning."""
    lines = [
        "# Every parameter of the node with its default. Ranges are part of the node: a bad value is refused with the",
        '# reason. "at start" is read-only afterwards, "at configure" needs `cleanup` first, "any time" acts on the',
        "# next window. QoS of a topic: qos_overrides.<resolved topic>.<subscription|publisher>.<reliability|...>.",
        "/**:",
        "  ros__parameters:",
    ]
    for spec in SPECS.values():
        lines += [f"    # --- {_HEADINGS[spec.name]}"] if spec.name in _HEADINGS else []
        lines += textwrap.wrap(
            f"{spec.description}. Accepted: {spec.range_text}. Changes {spec.changes}.",
            width=116,
            initial_indent="    # ",
            subsequent_indent="    # ",
        )
        lines.append(f"    {spec.name}: {_literal(spec.default)}")
    return "\n".join(lines) + "\n"
