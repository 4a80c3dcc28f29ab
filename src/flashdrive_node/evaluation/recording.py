"""Recordings of what the reference implementation computes on a small checkpoint, as directories of safetensors.

DIR/checkpoint/            config.json, *.safetensors (the backbone's files wherever vlm_name_or_path points)
DIR/inputs.safetensors     frames, camera indices, ego history, noise
DIR/manifest.json          arguments of the recording
DIR/cases/NAME.json        how the reference was called, and the texts
DIR/cases/NAME.safetensors every recorded tensor by name; may be absent where only our own values are wanted
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.prompt import CAMERA_NAMES
from flashdrive_node.model.sampling import SamplingSettings

_FRAMES_PER_CAMERA = 4


@dataclass(frozen=True)
class Case:
    """One recorded call: what goes in, how it was called, and what came out."""

    name: str
    #: uint8 [cameras, frames, 3, H, W], cameras in ascending index, frames oldest first.
    frames: Tensor
    camera_indices: tuple[int, ...]
    #: Ego history in the vehicle frame at t0, [16, 3] and [16, 3, 3].
    history_xyz: Tensor
    history_rot: Tensor
    nav_text: str | None
    #: A question instead of a drive.
    question: str | None
    samples: int
    sampling: SamplingSettings
    guided: bool
    guidance_weight: float | None
    flow_steps: int | None
    #: Starting points of the flow, scaled, [samples, waypoints, 2].
    noise: Tensor
    #: Tokens that the recording forced, row by row.
    script: tuple[tuple[int, ...], ...] | None
    #: Recorded tensors, or None.
    expected: dict[str, Tensor] | None
    #: Recorded texts ("cot", "answer", ...) per row, or None.
    expected_text: dict[str, list[str]] | None


@dataclass(frozen=True)
class Recording:
    """A directory of recorded cases over one checkpoint."""

    directory: Path
    cases: tuple[Case, ...]
    #: How the reference held its normalisation constants: "release" (rounded) or "exact".
    constants: str
    #: Threads that it was recorded with, or None: how a sum is split among threads changes its rounding.
    threads: int | None

    @property
    def checkpoint(self) -> Path:
        """Directory of the checkpoint."""
        return self.directory / "checkpoint"


def load_recording(directory: Path) -> Recording:
    """Read a recording.

    Raises:
        InputError: The directory is none, or a file in it cannot be used.
    """
    for name in ("manifest.json", "inputs.safetensors", "checkpoint/config.json", "cases"):
        if not (directory / name).exists():
            raise InputError(f"{directory} is not a recording: {name} is required, found nothing there")
    manifest = json.loads((directory / "manifest.json").read_text())
    inputs = load_file(directory / "inputs.safetensors")
    names = sorted({p.stem for p in (directory / "cases").iterdir() if p.suffix in (".json", ".safetensors")})
    # The manifest's order where it names them.
    order = [n for n in manifest.get("cases", {}) if n in names]
    names = order + [n for n in names if n not in order]
    if not names:
        raise InputError(f"{directory / 'cases'} holds no case (*.json)")
    threads = manifest.get("args", {}).get("threads")
    return Recording(
        directory,
        tuple(_case(directory, n, manifest, inputs) for n in names),
        _constants(manifest),
        None if threads is None else int(threads),
    )


def _constants(manifest: dict[str, Any]) -> str:
    """ "release" where every recorded constant is a bfloat16 number (or none is recorded), else "exact"."""
    buffers: dict[str, dict[str, Any]] = manifest.get("nonpersistent_buffers", {})
    values = torch.tensor([v for buffer in buffers.values() for v in buffer.get("values", [])], dtype=torch.float64)
    return "release" if torch.equal(values.bfloat16().double(), values) else "exact"


def _case(directory: Path, name: str, manifest: dict[str, Any], inputs: dict[str, Tensor]) -> Case:
    path = directory / "cases" / f"{name}.json"
    if not path.is_file():
        raise InputError(f"{path} is required: it says how the case was called")
    record = json.loads(path.read_text())
    call: dict[str, Any] = record["call"]
    prompt: str = record.get("prompt_text", "")
    arguments: dict[str, Any] = manifest.get("args", {})
    method: str = call["method"]
    guided, is_question = method.endswith("cfg_nav"), method == "generate_text"
    cameras = _cameras(prompt, inputs["camera_indices"].tolist(), name)
    rows = [inputs["camera_indices"].tolist().index(c) for c in cameras]
    later = name.startswith("slide")
    first = 1 if later else 0
    suffix = "_slide" if later else ""
    diffusion: dict[str, Any] = call.get("diffusion_kwargs") or {}
    samples = int(call.get("num_traj_samples", call.get("num_samples", 1)))
    if samples > len(inputs["noise"]):
        raise InputError(f"{path}: {samples} samples need as many rows of noise, inputs hold {len(inputs['noise'])}")
    nav = _between(prompt, "route")
    if nav is None and not prompt and (guided or name.startswith("nav")):
        nav = arguments.get("nav_text")
    question = (_between(prompt, "question") or arguments.get("question")) if is_question else None
    script = call.get("scripted_rows")
    tensors = directory / "cases" / f"{name}.safetensors"
    text = record.get("extra")
    return Case(
        name=name,
        frames=inputs["frames"][rows, first : first + _FRAMES_PER_CAMERA],
        camera_indices=tuple(cameras),
        history_xyz=inputs["ego_history_xyz" + suffix][0, -1],
        history_rot=inputs["ego_history_rot" + suffix][0, -1],
        nav_text=nav,
        question=question,
        samples=samples,
        sampling=SamplingSettings(
            temperature=float(call.get("temperature", 0.6)),
            top_p=float(call.get("top_p", 0.98)),
            top_k=call.get("top_k"),
            max_length=int(call.get("max_generation_length", 256 if is_question else 128)),
        ),
        guided=guided and diffusion.get("use_classifier_free_guidance", True),
        guidance_weight=diffusion.get("inference_guidance_weight"),
        flow_steps=diffusion.get("inference_step"),
        noise=inputs["noise"][:samples] * float(diffusion.get("temperature", 1.0)),
        script=None if script is None else tuple(tuple(r) for r in script),
        expected=load_file(tensors) if tensors.is_file() else None,
        expected_text=None if text is None else {k: _flatten(v) for k, v in text.items()},
    )


def _flatten(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [s for v in value for s in _flatten(v)]


def _between(prompt: str, token: str) -> str | None:
    found = re.search(rf"<\|{token}_start\|>(.*?)<\|{token}_end\|>", prompt, re.DOTALL)
    return found.group(1) if found else None


def _cameras(prompt: str, available: list[int], name: str) -> list[int]:
    """Camera indices that a case shows: those its prompt names, else all of them (a single one by its case's name)."""
    named = [i for i, text in enumerate(CAMERA_NAMES) if i in available and f"{text}: frame 0" in prompt]
    if named:
        return sorted(named)
    return [1] if name in ("onecam", "vqa") and 1 in available else sorted(available)


def script_tensor(script: tuple[tuple[int, ...], ...], pad: int, device: torch.device) -> Tensor:
    """Forced tokens as one matrix [rows, steps], padded behind each row's end."""
    steps = max(len(r) for r in script)
    return torch.tensor([[*r, *[pad] * (steps - len(r))] for r in script], device=device)
